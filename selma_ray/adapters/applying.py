"""A pipeline with an adapter in its denoiser and, where it has such parts, its text encoders, for rendering."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from selma_ray.adapters.files import local_adapter
from selma_ray.adapters.mixture_of_experts import is_mixture, load_mixture
from selma_ray.adapters.text_encoders import text_parts
from selma_ray.models.config import ModelConfig
from selma_ray.models.parts import denoiser_name, denoiser_of
from selma_ray.models.placing import place_pipeline
from selma_ray.models.rendering import open_pipeline

__all__ = ["load_adapted_pipeline"]


def load_adapted_pipeline(model: ModelConfig, adapter_dir: str | Path | None, device: torch.device | str) -> Any:
    """Load a pipeline onto a device, with a PEFT adapter folder (a path, or a URI) folded into it, or a mixture put into it."""
    pipeline: Any = open_pipeline(model)
    if model.card.offload == "none":
        pipeline.to(device)  # where folding is fastest; what is kept in the host's memory is folded there
    if adapter_dir is not None:
        _apply(pipeline, local_adapter(adapter_dir))
    return place_pipeline(pipeline, model, device)


def _apply(pipeline: Any, folder: Path) -> None:
    if is_mixture(folder):
        load_mixture(denoiser_of(pipeline), folder)
        return
    for name, place in {
        denoiser_name(pipeline): folder,
        **{part: folder / part for part in text_parts(folder)},
    }.items():
        adapted = PeftModel.from_pretrained(getattr(pipeline, name), str(place)).merge_and_unload()
        pipeline.register_modules(**{name: adapted})
