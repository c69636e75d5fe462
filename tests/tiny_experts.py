"""Small random LoRA experts for a pipeline, in PEFT's folder format."""

import math
from pathlib import Path
from typing import Any

import torch

from selma_ray.adapters.peft_format import LoraFactors, write_adapter
from selma_ray.models.parts import denoiser_of

RANKS = {"counting": 4, "style": 2, "common": 3}


def save_experts(pipeline: Any, folder: Path) -> dict[str, str]:
    """Write an adapter for each name, on other modules each but for some; returns their folders."""
    adapted = {
        name: module.weight.shape
        for name, module in denoiser_of(pipeline).named_modules()
        if (isinstance(module, torch.nn.Linear) and any(part in name for part in ("attn", ".attention.", ".ff.")))
        or (isinstance(module, torch.nn.Conv2d) and name.endswith(("conv1", "proj_in")))
    }
    generator = torch.Generator().manual_seed(0)
    for index, (name, rank) in enumerate(RANKS.items()):
        shapes = {
            module: tuple(shape) for position, (module, shape) in enumerate(adapted.items()) if position % 3 != index
        }
        factors = [
            LoraFactors(
                module,
                torch.randn(rank, math.prod(shape[1:]), generator=generator) / math.prod(shape[1:]) ** 0.5,
                torch.randn(shape[0], rank, generator=generator) * (2.0 if len(shape) == 2 else 0.1),
                1.0,
            )
            for module, shape in shapes.items()
        ]
        write_adapter(folder / name, factors, shapes, rank, "tiny")
    return {name: str(folder / name) for name in RANKS}
