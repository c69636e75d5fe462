import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="package")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Give this process a process group, as Ray Train gives a worker; one for all, as DeepSpeed keeps the first for good."""
    store = tmp_path_factory.mktemp("store") / "file"
    before = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
