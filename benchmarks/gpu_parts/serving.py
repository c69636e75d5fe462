"""The step-batching engine on requests that differ in steps, seeds, guidance and experts: against each alone, and diffusers' loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu_parts.device import rates_in_turns
from benchmarks.gpu_parts.examples import CAPTIONS
from benchmarks.gpu_parts.host_syncs import host_syncs
from benchmarks.gpu_parts.images import difference
from benchmarks.gpu_parts.pipelines import Subject, as_diffusers_has_it, random_pipeline
from benchmarks.gpu_parts.report import Report
from selma_ray.adapters.mixes import Mix
from selma_ray.adapters.mixing import Expert, LowRank
from selma_ray.models.parts import denoiser_name, denoiser_of
from selma_ray.models.placing import place_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.engine import Engine
from selma_ray.serving.generator import engine_for
from selma_ray.serving.requests import MERGED, ImageRequest

__all__ = ["compare_with_solo", "measure_serving", "mixed_requests", "served_pipelines", "steps_without_waiting"]

PART = "serving"
_RANK = 16
_WATCHED_STEPS = 4
_MIXES: Sequence[Mix | None] = (
    MERGED, (("first", 1.0),), MERGED, (("first", 0.5), ("second", 0.5)), (), (("second", 1.0),), MERGED, (("first", 0.7), ("third", 0.3)),
)  # fmt: skip
_GUIDANCE = (1.0, 3.5, 7.5)


def measure_serving(subject: Subject, device: torch.device, report: Report) -> None:
    """Measure one family."""
    made: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        made["pipeline"], made["base"] = served_pipelines(subject, device)
        return {"experts": 3, "rank": _RANK, "requests": len(_MIXES)}

    name = subject.family
    if report.measure(PART, f"{name} load", load) is None:
        return
    pipeline, base = made.pop("pipeline"), made.pop("base")
    report.measure(PART, f"{name} speed", lambda: _speed(pipeline, base, subject, device, report))
    report.measure(PART, f"{name} solo", lambda: compare_with_solo(pipeline, base, subject))
    report.measure(PART, f"{name} host syncs", lambda: steps_without_waiting(pipeline, base, subject, device))


def served_pipelines(subject: Subject, device: torch.device) -> tuple[Any, Any]:
    """Return a pipeline, and another one on a denoiser of its own that shares the rest, for experts to be mixed on."""
    pipeline = place_pipeline(random_pipeline(subject, device), subject.model, device)
    base = copy(pipeline)
    setattr(base, denoiser_name(pipeline), deepcopy(denoiser_of(pipeline)))
    return pipeline, base


def mixed_requests(subject: Subject, steps: Sequence[int] = ()) -> list[ImageRequest]:
    """Return eight requests; their steps are up to half of the subject's unless they are given."""
    most = max(2, subject.sampling.steps // 2)
    steps = steps or (most, max(2, most // 2), max(2, 3 * most // 4), most + 1)
    return [
        ImageRequest(
            CAPTIONS[index % len(CAPTIONS)], 7 * index, steps[index % len(steps)], _GUIDANCE[index % len(_GUIDANCE)],
            subject.sampling.width_px, subject.sampling.height_px, mix=mix,
        )
        for index, mix in enumerate(_MIXES)
    ]  # fmt: skip


def compare_with_solo(pipeline: Any, base: Any, subject: Subject) -> dict[str, Any]:
    """Return how far the images of eight requests at once are from each drawn alone, by the engine and, without experts, by diffusers."""
    requests = mixed_requests(subject)
    merged = [index for index, request in enumerate(requests) if request.mix is MERGED]
    with _engine(pipeline, base, subject) as engine:
        together = _drawn(engine, requests)
        alone = [_drawn(engine, [request])[0] for request in requests]
    by_diffusers = [_diffusers(pipeline, subject, requests[index]) for index in merged]
    return {
        "from_engine_alone": difference(together, alone),
        "from_diffusers": difference([together[index] for index in merged], by_diffusers),
    }


def steps_without_waiting(pipeline: Any, base: Any, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return how often a step makes the host wait for the device; encoding, the first noise and decoding are outside."""
    mixing = _own_hooks(base)
    batch = StepBatch(denoiser_for(pipeline), len(_MIXES), _size_px(subject), denoiser_for(mixing, _experts(mixing)))
    for request in mixed_requests(subject, steps=(2 * _WATCHED_STEPS + 4,)):
        batch.submit(request)
    for _ in range(4):  # both lanes have their requests, and their experts stacked
        batch.step()
    return host_syncs(batch.step, _WATCHED_STEPS, device)


def _speed(pipeline: Any, base: Any, subject: Subject, device: torch.device, report: Report) -> dict[str, Any]:
    """Return denoising steps/s, counted for each image; diffusers draws the same one by one, all without experts."""
    requests = mixed_requests(subject)
    steps = sum(request.steps for request in requests)
    with _engine(pipeline, base, subject) as engine:
        ways = {
            "ours": lambda: _drawn(engine, requests),
            "diffusers": lambda: [_diffusers(pipeline, subject, request) for request in requests],
        }
        rates = rates_in_turns(ways, device, report.seconds_left, subject.rounds)
        occupancy = {str(size): count for size, count in sorted(engine.stats().occupancy.items())}
    return {
        "image_steps": steps,
        **{f"{way}_steps_per_s": round(steps * rate, 3) for way, rate in rates.items()},
        "serve_over_diffusers": round(rates["ours"] / rates["diffusers"], 3),
        "occupancy": occupancy,
    }


@contextmanager
def _engine(pipeline: Any, base: Any, subject: Subject) -> Iterator[Engine]:
    sampling = subject.sampling
    config = ServingConfig(
        sampling=sampling,
        max_batch_size=len(_MIXES),
        max_size_px=max(sampling.width_px, sampling.height_px),
        request_timeout_s=600,
    )
    mixing = _own_hooks(base)
    engine = engine_for(pipeline, config, mixing, _experts(mixing))
    try:
        yield engine
    finally:
        engine.close()


def _own_hooks(base: Any) -> Any:
    """Return a pipeline whose denoiser shares the weights of another's: experts are hooks, which would add up otherwise."""
    mixing, denoiser = copy(base), denoiser_of(base)
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    setattr(mixing, denoiser_name(base), deepcopy(denoiser, {id(tensor): tensor for tensor in tensors}))
    return mixing


def _experts(pipeline: Any) -> Mapping[str, Expert]:
    generator = torch.Generator().manual_seed(1)
    layers = {
        name: module
        for name, module in denoiser_of(pipeline).named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    return {
        name: {layer: _low_rank(module, generator) for layer, module in layers.items()}
        for name in ("first", "second", "third")
    }


def _low_rank(module: torch.nn.Linear, generator: torch.Generator) -> LowRank:
    rows, columns = module.weight.shape
    return LowRank(
        torch.randn(_RANK, columns, generator=generator) / columns**0.5,
        torch.randn(rows, _RANK, generator=generator) / rows**0.5,
    )


def _drawn(engine: Engine, requests: Sequence[ImageRequest]) -> list[Image.Image]:
    return [future.result(timeout=600) for future in engine.submit(requests)]


def _diffusers(pipeline: Any, subject: Subject, request: ImageRequest) -> Image.Image:
    with as_diffusers_has_it(pipeline, subject), torch.inference_mode():
        return pipeline(
            prompt=request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=request.width_px,
            height=request.height_px,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        ).images[0]


def _size_px(subject: Subject) -> tuple[int, int]:
    return subject.sampling.height_px, subject.sampling.width_px
