"""What a call really allocates, and inputs of every family for it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["guidance_arguments", "longest", "most_allocated_bytes", "random_examples"]


def random_examples(family: Any, count: int, height_px: int, width_px: int) -> dict[str, torch.Tensor]:
    """Return encoded examples as `example_shapes` has them, whose texts are as long as texts can be."""
    shapes = family.example_shapes(height_px, width_px)
    return {
        name: torch.ones((count, *shape), dtype=torch.bool) if name == "mask_NT" else torch.rand((count, *shape))
        for name, shape in shapes.items()
    }


def longest(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return a tensor's shape with its text as long as a text can be, where texts have any length."""
    if "mask_NT" not in shapes or name not in ("text_NTD", "mask_NT"):
        return tuple(shape)
    assert 0 < shape[0] <= shapes[name][0]
    return (shapes[name][0], *shape[1:])


def guidance_arguments(pipeline: Any, scale: float, negative_prompt: str = "") -> dict[str, Any]:
    """Return what a pipeline's own call is told of guidance."""
    if type(pipeline).__name__ == "Flux2KleinPipeline":
        negative = {"negative_prompt_embeds": pipeline.encode_prompt(negative_prompt)[0]} if negative_prompt else {}
        return {"guidance_scale": scale, **negative}
    if type(pipeline).__name__ == "SanaPipeline":
        return {"guidance_scale": scale, "negative_prompt": negative_prompt, "use_resolution_binning": False}
    if type(pipeline).__name__ == "QwenImagePipeline":
        return {"true_cfg_scale": scale, "negative_prompt": negative_prompt or " "}
    return {"guidance_scale": scale, "negative_prompt": negative_prompt or None}


def most_allocated_bytes(call: Callable[[], Any]) -> int:
    """Return the most that is allocated at once, beyond what was there, during a second call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    allocations = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
