"""Full-size pipelines: our renderer against diffusers' own call, the autoencoder's memory, and batches that do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_parts.device import peak_memory, rates_in_turns, synchronize
from benchmarks.gpu_parts.images import difference
from benchmarks.gpu_parts.pipelines import Subject, as_diffusers_has_it, random_pipeline
from benchmarks.gpu_parts.report import Report
from selma_ray.models.placing import place_pipeline
from selma_ray.models.rendering import CPU_LANES, Renderer

__all__ = ["measure_rendering", "render_too_large_a_batch"]

PART = "rendering"
_PROMPTS = ("two blue bananas", "a red ball left of a cup", "a cat", "three green apples on a table")


def measure_rendering(subject: Subject, device: torch.device, report: Report) -> None:
    """Measure one family; what fails leaves the rest alone."""
    made: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        with peak_memory(device) as memory:
            made["pipeline"] = place_pipeline(random_pipeline(subject, device), subject.model, device)
        return {"weights_bytes": memory.added_bytes, "dtype": subject.model.dtype}

    if report.measure(PART, f"{subject.family} load", load) is None:
        return
    pipeline, name = made.pop("pipeline"), subject.family
    report.measure(PART, f"{name} speed", lambda: _speed(pipeline, subject, device, report))
    report.measure(PART, f"{name} memory", lambda: _memory(pipeline, subject, device))
    report.measure(PART, f"{name} vae", lambda: _autoencoder(pipeline, subject, device))
    report.measure(PART, f"{name} out of memory, raised", lambda: render_too_large_a_batch(pipeline, subject, device))
    if device.type == "cuda":
        report.measure(PART, f"{name} out of memory, real", lambda: _render_in_little_memory(pipeline, subject, device))


def _speed(pipeline: Any, subject: Subject, device: torch.device, report: Report) -> dict[str, Any]:
    """Return images/s of both ways, on the same pipeline, prompts, seeds and batch, which is a CPU's full set of lanes there."""
    size = CPU_LANES if device.type == "cpu" else subject.batch_size
    prompts, seeds = _rows(size)
    renderer, images = Renderer(pipeline, subject.sampling), {}

    def ours() -> None:
        images["ours"] = renderer.render(prompts, seeds)

    def theirs() -> None:
        images["diffusers"] = _diffusers(pipeline, subject, prompts, seeds)

    rates = rates_in_turns({"ours": ours, "diffusers": theirs}, device, report.seconds_left, subject.rounds)
    return {
        "batch_size": size,
        "steps": subject.sampling.steps,
        "size_px": [subject.sampling.width_px, subject.sampling.height_px],
        **{f"{way}_images_per_s": round(size * rate, 4) for way, rate in rates.items()},
        "render_over_diffusers": round(rates["ours"] / rates["diffusers"], 3),
        "pixels_from_diffusers": difference(images["ours"], images["diffusers"]),
    }


def _memory(pipeline: Any, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return what a batch takes beside the weights, at the most; a step is enough, as all are alike."""
    renderer = Renderer(pipeline, subject.sampling.model_copy(update={"steps": 1}))
    added = {}
    for size in sorted({1, subject.batch_size}):
        with peak_memory(device) as memory:
            renderer.render(*_rows(size))
        added[str(size)] = memory.added_bytes
    return {"added_bytes_by_batch": added}


@torch.inference_mode()
def _autoencoder(pipeline: Any, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return what decoding takes beside the weights, in the precision that the pipeline decodes in."""
    vae, sampling = pipeline.vae, subject.sampling
    dtype = torch.float32 if vae.dtype == torch.float16 and vae.config.force_upcast else vae.dtype
    before, added = vae.dtype, {}
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.to(dtype)
    try:
        for size in sorted({1, subject.batch_size}):
            shape = (size, vae.config.latent_channels, sampling.height_px // factor, sampling.width_px // factor)
            latents_NChw = torch.randn(shape, device=device, dtype=dtype)
            with peak_memory(device) as memory:
                vae.decode(latents_NChw)
            added[str(size)] = memory.added_bytes
    finally:
        vae.to(before)
    return {"dtype": str(dtype).removeprefix("torch."), "added_bytes_by_batch": added}


def render_too_large_a_batch(pipeline: Any, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return how a batch is rendered whose decoding runs out of memory above half of it."""
    size = CPU_LANES if device.type == "cpu" else subject.batch_size
    with _memory_for(pipeline, size // 2):
        return _halved(pipeline, subject, size)


def _render_in_little_memory(pipeline: Any, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return how a batch is rendered where PyTorch may take no more of the card than half of it needs, and a little."""
    size, total = 2 * subject.batch_size, torch.cuda.get_device_properties(device).total_memory
    one_step = subject.sampling.model_copy(update={"steps": 1})
    reserved = []
    for count in (size // 2, size):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        Renderer(pipeline, one_step).render(*_rows(count))
        synchronize(device)
        reserved.append(torch.cuda.max_memory_reserved(device))
    torch.cuda.empty_cache()
    limit = (reserved[0] + reserved[1]) / 2
    torch.cuda.set_per_process_memory_fraction(limit / total, device)  # PyTorch's own limit, of this process alone
    try:
        return {"limit_bytes": int(limit), "reserved_bytes": reserved, **_halved(pipeline, subject, size)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _halved(pipeline: Any, subject: Subject, size: int) -> dict[str, Any]:
    renderer, before = Renderer(pipeline, subject.sampling.model_copy(update={"steps": 2})), pipeline.vae.dtype
    images = renderer.render(*_rows(size))
    return {
        "asked": size,
        "rendered": len(images),
        "batch_size_after": renderer._batches.size,
        "vae_precision_kept": pipeline.vae.dtype == before,
    }


@contextmanager
def _memory_for(pipeline: Any, most: int) -> Iterator[None]:
    """Let decoding raise what PyTorch raises without memory, for more than `most` images."""
    decode = pipeline.vae.decode

    def decode_few(latents_NChw: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(latents_NChw) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (raised by the benchmark)")
        return decode(latents_NChw, *arguments, **options)

    with mock.patch.object(pipeline.vae, "decode", decode_few):
        yield


def _diffusers(pipeline: Any, subject: Subject, prompts: list[str], seeds: list[int]) -> Any:
    """Draw by diffusers' own call, as its documentation shows it."""
    sampling = subject.sampling
    with as_diffusers_has_it(pipeline, subject), torch.inference_mode():
        return pipeline(
            prompt=prompts,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            width=sampling.width_px,
            height=sampling.height_px,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images


def _rows(count: int) -> tuple[list[str], list[int]]:
    return [_PROMPTS[index % len(_PROMPTS)] for index in range(count)], list(range(count))
