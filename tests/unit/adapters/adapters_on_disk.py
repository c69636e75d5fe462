"""Small adapters in PEFT's own format, written by PEFT."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from peft import LoraConfig, get_peft_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MORE_TARGETS = [*TARGETS, "ff.net.0.proj", "ff.net.2", "time_emb_proj"]  # as in the miniature's recipes


def save_random_adapter(pipeline_dir: Path, folder: Path, seed: int, rank: int = 4, **options: Any) -> Path:
    """Write an adapter of the pipeline's denoiser whose factors are random, so that no delta is zero."""
    name = "unet" if (pipeline_dir / "unet").is_dir() else "transformer"
    denoiser = AutoModel.from_pretrained(str(pipeline_dir), subfolder=name)
    options = {"lora_alpha": rank, "target_modules": TARGETS, **options}
    model = get_peft_model(denoiser, LoraConfig(r=rank, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder
