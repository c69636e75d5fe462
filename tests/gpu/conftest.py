"""Every check runs twice: with tiny models on the CPU, everywhere, and on a card, marked `gpu`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_parts.device import process_group, the_device
from benchmarks.gpu_parts.pipelines import Subject, subject


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return the_device(request.param)


@pytest.fixture(scope="session")
def worker(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """Be what Ray Train makes of a process."""
    if device.type == "cuda":
        with process_group(device):
            yield
    elif torch.cuda.is_available():
        pytest.skip("DeepSpeed takes the card of this machine for the CPU's tests, too")
    else:
        request.getfixturevalue("process_group")
        yield


@pytest.fixture(scope="session")
def make_subject(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Return what makes a family's tiny configurations."""

    def make(family: str) -> Subject:
        folder: Path = tmp_path_factory.mktemp("subjects") / family
        return subject(family, folder, device, tiny=True)

    return make
