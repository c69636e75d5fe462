"""What tests of serving share; tiny models are fastest on one thread."""

from collections.abc import Iterator

import pytest
import torch

from tests.unit.serving.recorder import Recorder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend() -> Recorder:
    """Return a backend that keeps what it is asked for."""
    return Recorder()
