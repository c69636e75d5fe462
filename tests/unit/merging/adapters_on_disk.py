"""Small adapters in PEFT's own format, written by PEFT."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def save_random_adapter(pipeline_dir: Path, folder: Path, seed: int, rank: int = 4, **options) -> Path:
    """Write an adapter of the pipeline's UNet whose factors are random, so that no delta is zero."""
    unet = UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")
    options = {"lora_alpha": rank, **options}
    model = get_peft_model(unet, LoraConfig(r=rank, target_modules=TARGETS, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder
