"""Small random LoRA experts for a pipeline, in PEFT's folder format."""

from pathlib import Path
from typing import Any

import torch

from selma_ray.adapters.peft_format import LoraFactors, write_adapter
from selma_ray.models.parts import denoiser_of

RANKS = {"counting": 4, "style": 2, "common": 3}


def save_experts(pipeline: Any, folder: Path) -> dict[str, str]:
    """Write an adapter for each name, on other modules each but for some; returns their folders."""
    linear = {
        name: module.weight.shape
        for name, module in denoiser_of(pipeline).named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in ("attn", "attention", ".ff."))
    }
    generator = torch.Generator().manual_seed(0)
    for index, (name, rank) in enumerate(RANKS.items()):
        shapes = {
            module: tuple(shape) for position, (module, shape) in enumerate(linear.items()) if position % 3 != index
        }
        factors = [
            LoraFactors(
                module,
                torch.randn(rank, columns, generator=generator) / columns**0.5,
                torch.randn(rows, rank, generator=generator) * 2.0,
                1.0,
            )
            for module, (rows, columns) in shapes.items()
        ]
        write_adapter(folder / name, factors, shapes, rank, "tiny")
    return {name: str(folder / name) for name in RANKS}
