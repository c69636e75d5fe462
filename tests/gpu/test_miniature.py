"""The miniature on a device draws, encodes and learns what it does on the CPU."""

from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.miniature import (
    SAMPLING,
    TINY_SAMPLING,
    compare_images,
    compare_losses,
    cpu_images,
    exact_fp32,
    fit_expert,
)

MOST_OF_255 = {"fp32": 0.05, "bf16": 4.0, "fp16": 0.5}
"""Mean difference of pixels from fp32 on the CPU: four times what the CPU's own bf16 (0.9) and fp16 (0.1) differ by."""


@pytest.mark.parametrize("dtype", list(MOST_OF_255))
def test_images_are_those_of_the_cpu_and_no_batch_changes_them(device: torch.device, dtype: str) -> None:
    count, sampling = (2, TINY_SAMPLING) if device.type == "cpu" else (4, SAMPLING)
    with exact_fp32():
        found = compare_images(dtype, device, cpu_images(count, sampling), sampling, tf32=False)
    for difference in found.values():
        assert difference["mean_of_255"] <= MOST_OF_255[dtype], found
    if device.type == "cpu" and dtype == "fp32":
        assert found["from_cpu_fp32"]["max_of_255"] == 0


def test_latents_texts_and_losses_are_those_of_the_cpu(device: torch.device) -> None:
    found = compare_losses(device)
    assert found.keys() == {"latent_mean", "latent_std", "text_NTD", "loss"}
    assert max(found.values()) < 1e-3, found


@pytest.mark.usefixtures("worker")
def test_an_expert_is_encoded_fitted_and_exported(device: torch.device) -> None:
    found: Any = fit_expert(device)
    assert found["exported"]
    assert found["examples"] == 8
    assert all(0.01 < loss < 2 for loss in found["losses"]), found
