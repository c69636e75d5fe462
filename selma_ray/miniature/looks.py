"""Small LoRAs for the miniature, each fitted to one look of its scenes by diffusers and PEFT alone: something to merge, serve and compare.

`python -m selma_ray.miniature.looks sepia night negative --out loras` writes loras/sepia.safetensors and so on, each
within half a minute on two CPU cores.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps

from selma_ray.miniature import world
from selma_ray.miniature.locate import text_to_image_dir

__all__ = ["LOOKS", "fit_look"]

_SKILL = "common"
# Attention says what goes where; the colours of a whole image are in the convolutions.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out"]
_SCENES, _BATCH, _RANK, _LEARNING_RATE = 64, 4, 8, 3e-3
_LARGEST_GRADIENT_NORM = 1.0


def _sepia(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), "#301808", "#fff0d0")


def _night(image: Image.Image) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, "#081048"), 0.6)


LOOKS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "sepia": _sepia,
    "night": _night,
    "negative": ImageOps.invert,
}
"""What each look makes of a scene."""


def fit_look(look: str, folder: Path, steps: int = 60, seed: int = 0) -> Path:
    """Fit a LoRA to scenes in one of LOOKS and return its file in the folder, which diffusers, ComfyUI and `selma merge-adapters` read."""
    pipeline = StableDiffusionPipeline.from_pretrained(text_to_image_dir())
    pipeline.unet.requires_grad_(False)
    torch.manual_seed(seed)
    pipeline.unet.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_TARGETS))
    latents_NCHW, texts_NTD = _encoded(pipeline, LOOKS[look], seed)
    _fit(pipeline, latents_NCHW, texts_NTD, steps)
    weights = get_peft_model_state_dict(pipeline.unet)
    name = f"{look}.safetensors"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights, weight_name=name)
    return folder / name


@torch.no_grad()
def _encoded(
    pipeline: StableDiffusionPipeline, look: Callable[[Image.Image], Image.Image], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents of scenes in a look, and the embeddings of their captions."""
    captions = world.sample_captions(_SKILL, _SCENES, seed, set())
    images = [look(world.draw_caption(caption, number)) for number, caption in enumerate(captions)]
    pixels_NCHW = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    latents_NCHW = pipeline.vae.encode(pixels_NCHW).latent_dist.mean * pipeline.vae.config.scaling_factor
    texts_NTD, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    return latents_NCHW, texts_NTD


def _fit(pipeline: StableDiffusionPipeline, latents_NCHW: torch.Tensor, texts_NTD: torch.Tensor, steps: int) -> None:
    """Take optimiser steps on what the pipeline is trained to predict, as its own training took them."""
    scheduler = pipeline.scheduler
    parameters = [each for each in pipeline.unet.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    for _ in range(steps):
        rows = torch.randint(len(latents_NCHW), (_BATCH,))
        noise, times = torch.randn_like(latents_NCHW[rows]), torch.randint(len(scheduler.betas), (_BATCH,))
        noisy = scheduler.add_noise(latents_NCHW[rows], noise, times)
        predicted = pipeline.unet(noisy, times, texts_NTD[rows]).sample
        wanted = scheduler.get_velocity(latents_NCHW[rows], noise, times)
        torch.nn.functional.mse_loss(predicted, wanted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT_NORM)
        optimiser.step()
        optimiser.zero_grad()


def _main(arguments: Sequence[str] | None = None) -> None:
    """Fit the looks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m selma_ray.miniature.looks", description=__doc__)
    parser.add_argument("looks", nargs="+", choices=list(LOOKS), help="the looks to fit")
    parser.add_argument("--out", type=Path, default=Path("loras"), help="the folder of their files (default: loras)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each (default: 60)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    for look in options.looks:
        sys.stdout.write(f"{fit_look(look, options.out, options.steps)}\n")


if __name__ == "__main__":
    _main()
