"""The miniature on the device against its images on the CPU, precision by precision; batches against rows alone; an expert of it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.drawn_run import draw_run
from benchmarks.gpu_parts.device import fp32_products
from benchmarks.gpu_parts.images import difference
from benchmarks.gpu_parts.report import Report
from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.files import is_adapter
from selma_ray.experts.cache import EncodeExamples, encode_here, skill_cache
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.examples import EncodedExamples
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.trainer import ExpertTrainer
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import open_family
from selma_ray.models.parts import DTYPES
from selma_ray.models.rendering import Renderer, load_pipeline
from selma_ray.storage import RunFolder

__all__ = [
    "SAMPLING",
    "TINY_SAMPLING",
    "compare_images",
    "compare_losses",
    "cpu_images",
    "exact_fp32",
    "fit_expert",
    "measure_miniature",
]

PART = "miniature"
_PROMPTS = (
    "two blue bananas to the left of a red car",
    "a green apple",
    "three yellow cups",
    "a red ball above a blue box",
    "a purple tree to the right of a yellow star",
    "four orange fish",
)
SAMPLING = SamplingConfig(steps=10, guidance_scale=4.0, width_px=64, height_px=64)
TINY_SAMPLING = SamplingConfig(steps=2, guidance_scale=4.0, width_px=32, height_px=32)
"""For a CPU, which is slow in bf16 and fp16."""
_SKILL = "counting"
_STEPS = 4


def measure_miniature(device: torch.device, report: Report, *, tiny: bool) -> None:
    """Measure every precision, then encoding, the loss and an expert; a process group must be up. `tiny` takes fewer images and steps."""
    count, sampling = (2, TINY_SAMPLING) if tiny else (len(_PROMPTS), SAMPLING)
    expected = cpu_images(count, sampling)

    def images(dtype: str, *, tf32: bool = True) -> dict[str, Any]:
        return compare_images(dtype, device, expected, sampling, tf32=tf32)

    with exact_fp32():
        report.measure(PART, "fp32, no tf32", lambda: images("fp32", tf32=False))
    for dtype in DTYPES:
        report.measure(PART, dtype, partial(images, dtype))
    report.measure(PART, "losses", lambda: compare_losses(device))
    report.measure(PART, "expert", lambda: fit_expert(device))


def cpu_images(count: int, sampling: SamplingConfig) -> list[Image.Image]:
    """Draw the first prompts in fp32 on the CPU."""
    return Renderer(load_pipeline(ModelConfig(), "cpu"), sampling).render(_PROMPTS[:count], range(count))


def compare_images(
    dtype: str, device: torch.device, expected: Sequence[Image.Image], sampling: SamplingConfig, *, tf32: bool = True
) -> dict[str, Any]:
    """Return how far images drawn on the device are from the `expected` ones, the CPU's, and those of a batch from each alone."""
    prompts, seeds = _PROMPTS[: len(expected)], range(len(expected))
    model = ModelConfig.model_validate({"dtype": dtype, "card": {"tf32": tf32}})
    renderer = Renderer(load_pipeline(model, device), sampling)
    with _noise_drawn_in_fp32():
        batched = renderer.render(prompts, seeds)
        alone = [renderer.render([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    return {"from_cpu_fp32": difference(batched, expected), "batched_from_alone": difference(batched, alone)}


@contextmanager
def _noise_drawn_in_fp32() -> Iterator[None]:
    """Give a seed the same noise in every precision: PyTorch 2.11 draws other numbers in half precision, 2.13 the same ones rounded."""
    randn = torch.randn

    def drawn(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return randn(*size, dtype=torch.float32, **options).to(dtype or torch.get_default_dtype())

    with mock.patch.object(torch, "randn", drawn):
        yield


def compare_losses(device: torch.device) -> dict[str, float]:
    """Return how far encoded images and the loss are from the CPU's, relative to the largest value there."""
    family, found = open_family(ModelConfig()), {}
    images_NHW3 = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with exact_fp32():
        for where in ("cpu", device):
            encoders = family.load_encoders(where)
            batch = encoders.encode_images(images_NHW3) | encoders.encode_prompts(_PROMPTS[:4], 64, 64)
            moved = {name: tensor.to(where) for name, tensor in batch.items()}
            denoiser = family.load_denoiser().to(where)
            generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
            with torch.no_grad():
                errors_N = family.errors(denoiser, moved, generators).cpu()
            found[str(where)] = {**batch, "loss": errors_N}
    cpu, there = found["cpu"], found[str(device)]
    return {
        name: float((there[name].float() - cpu[name].float()).abs().max() / cpu[name].float().abs().max())
        for name in cpu
    }


def fit_expert(device: torch.device, precision: str = "auto") -> dict[str, Any]:
    """Encode drawn images, fit an expert for a few steps and export it, all on the device; a process group must be up."""
    gpus = 1 if device.type == "cuda" else 0
    config = ExpertsConfig.model_validate(
        {
            "lora": LoraSettings(rank=8, alpha=8), "steps": _STEPS, "batch_size": 8, "learning_rate": 5e-4, "gpus_per_worker": gpus,
            "precision": precision,
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as path:
        folder = draw_run(path, [_SKILL], 8)
        job = _encoded(folder, config, gpus)
        trainer = ExpertTrainer(job)
        try:
            losses = [trainer.step() for _ in range(_STEPS)]
            trainer.export(seconds=0)
        finally:
            trainer.close()
        return {
            "losses": losses,
            "examples": len(EncodedExamples(folder, job.caches)),
            "exported": is_adapter(folder, job.directory),
        }


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Let fp32 be fp32 on a card, where convolutions and products are done in TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with fp32_products("highest"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _encoded(folder: RunFolder, config: ExpertsConfig, gpus: int) -> ExpertJob:
    model = ModelConfig()
    cache = skill_cache(folder, _SKILL, model)
    encode_here(folder, cache, EncodeExamples(folder, model, cache.ids, gpus))
    return ExpertJob(_SKILL, folder, (cache.directory,), (cache.key,), model, config, seed=0)
