"""Tiny pipelines of every family on a device: batches that do not fit, training in every mode, serving without waiting."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.device import free_memory
from benchmarks.gpu_parts.pipelines import FAMILIES, Subject, random_pipeline
from benchmarks.gpu_parts.rendering import render_too_large_a_batch
from benchmarks.gpu_parts.serving import compare_with_solo, served_pipelines, steps_without_waiting
from benchmarks.gpu_parts.training import fit_steps, modes
from selma_ray.storage import RunFolder

MOST_OF_255 = 2.0
"""Mean difference of pixels in half precision, whose products round differently from batch to batch: at most 0.5 on the CPU."""
MOST_SYNCS_PER_STEP = {"cpu": 0, "cuda": 4}
"""On a card: the wait that keeps the host one step behind, and copies of timesteps and of the weights of experts."""


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, make_subject: Callable[[str], Subject]) -> Iterator[Subject]:
    yield make_subject(request.param)
    free_memory()


def test_a_batch_that_does_not_fit_is_halved_and_the_autoencoder_keeps_its_precision(
    family: Subject, device: torch.device
) -> None:
    found = render_too_large_a_batch(random_pipeline(family, device), family, device)
    assert found["rendered"] == found["asked"]
    assert found["batch_size_after"] == found["asked"] // 2
    assert found["vae_precision_kept"]


@pytest.mark.usefixtures("worker")
def test_an_expert_is_fitted_and_exported_in_every_mode(family: Subject, device: torch.device, tmp_path: Path) -> None:
    losses: dict[str, Any] = {}
    for number, (mode, config) in enumerate(modes(family.experts)):
        found = fit_steps(family, config, device, RunFolder(str(tmp_path / str(number))))
        assert found["exported"], mode
        assert all(math.isfinite(loss) for loss in found["losses"]), (mode, found)
        losses[mode] = found["losses"][0]
    assert len(losses) >= 6
    # Before the first step the adapter adds nothing: what differs is the rounding of the base.
    exact = next(iter(losses.values()))
    assert losses == {mode: pytest.approx(exact, rel=0.05) for mode in losses}


def test_mixed_requests_equal_each_alone_and_no_step_waits(family: Subject, device: torch.device) -> None:
    pipeline, base = served_pipelines(family, device)
    found = compare_with_solo(pipeline, base, family)
    assert found["from_engine_alone"]["mean_of_255"] <= MOST_OF_255, found
    assert found["from_diffusers"]["mean_of_255"] <= MOST_OF_255, found
    waits = steps_without_waiting(pipeline, base, family, device)
    assert waits["host_syncs_per_step"] <= MOST_SYNCS_PER_STEP[device.type], waits
