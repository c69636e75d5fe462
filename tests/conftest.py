"""Fixtures for every suite."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# The same examples at every run, so that a change is judged by itself; HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Set before torch is imported: tests run beside other processes, whose threads and ours would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test asks the hub; what a test wants of it, it asks a server of its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED_EVAL = Path(__file__).resolve().parents[2] / "shared" / "eval"


@pytest.fixture(autouse=True)
def gpus_in_sight() -> Iterator[None]:
    """Undo what a worker's class, made in the tests' own process, hides from it."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    if before is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(scope="session")
def shared_eval() -> Path:
    """Return the folder of evaluation data and oracles, or skip where it is not laid beside the checkout."""
    if not SHARED_EVAL.is_dir():
        pytest.skip("the folder shared/eval with evaluation data is not beside this checkout")
    return SHARED_EVAL


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Stable Diffusion folder with small random weights: 64 px images, 16 x 16 x 4 latents."""
    from tests.tiny_models import save_tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    save_tiny_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """Give this process a process group, as Ray Train gives a worker; one for all suites, as DeepSpeed keeps the first for good."""
    import torch

    from benchmarks.gpu_parts.device import process_group

    with process_group(torch.device("cpu")):
        yield


# Not for the whole session: Playwright keeps an event loop running in the thread that started it.
@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """Yield one headless Chromium to the tests of a module, or skip them where the machine has none."""
    from tests.chromium import open_chromium

    with open_chromium() as browser:
        yield browser
