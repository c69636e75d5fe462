"""Putting a loaded pipeline where it computes: the CPU as it is, a card as `model.card` says."""

from typing import Any

import torch

from selma_ray.errors import ConfigError
from selma_ray.models.config import CardConfig, ModelConfig
from selma_ray.models.parts import denoiser_of

__all__ = ["place_on_card", "place_pipeline"]


def place_pipeline(pipeline: Any, model: ModelConfig, device: torch.device | str) -> Any:
    """Put a pipeline, whose denoiser is as it will stay, on a device and return it."""
    device = torch.device(device)
    if model.vae_tiling:
        pipeline.vae.enable_tiling()
    return place_on_card(pipeline, model.card, device) if device.type == "cuda" else pipeline.to(device)


def place_on_card(pipeline: Any, card: CardConfig, device: torch.device) -> Any:
    """Put a pipeline on a card and return it; raises ConfigError where its autoencoder or denoiser has no such option."""
    if card.tf32:
        torch.set_float32_matmul_precision("high")
    if card.vae_slicing and hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()
    if card.channels_last:
        for part in (denoiser_of(pipeline), pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if card.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif card.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if card.compile:
        _compile(denoiser_of(pipeline), card)
    return pipeline


def _compile(denoiser: Any, card: CardConfig) -> None:
    """Compile the blocks that repeat, once for all of them, or the whole where the denoiser does not name them."""
    if card.offload == "sequential":
        raise ConfigError(
            "model.card.compile must be false with model.card.offload=sequential, whose hooks it cannot trace"
        )
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(dynamic=True)
    else:
        denoiser.compile(dynamic=True)
