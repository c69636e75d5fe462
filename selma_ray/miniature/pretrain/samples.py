"""Sample grids to look at while the denoiser trains."""

import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.pretrain.text_encoder import load_tokenizer
from selma_ray.pictures import picture_grid

__all__ = ["assemble_pipeline", "draw_samples", "tile_with_captions"]

logger = logging.getLogger(__name__)

_CELL_PX = 128


def assemble_pipeline(work_dir: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Join a denoiser with the work folder's tokenizer, text encoder and autoencoder."""
    from selma_ray.miniature.pretrain.unet import new_scheduler

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work_dir / "text_encoder"),
        tokenizer=load_tokenizer(work_dir / "tokenizer"),
        unet=unet,
        scheduler=new_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_samples(work_dir: Path, unet: UNet2DConditionModel, step: int) -> None:
    """Draw 36 held-out captions into `samples/step.png`; with a judge, log DSG on a hundred."""
    pipeline = assemble_pipeline(work_dir, unet)
    judge_dir = work_dir / "judge"
    per_skill = 20 if judge_dir.exists() else 8
    captions = [caption for skill in heldout_by_skill().values() for caption in skill[:per_skill]]
    images: list[Image.Image] = []
    for start in range(0, len(captions), 20):
        chunk = captions[start : start + 20]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(chunk))]
        with torch.autocast("cpu", torch.bfloat16):
            output = pipeline(
                chunk, num_inference_steps=15, guidance_scale=2.5, height=64, width=64, generator=generators
            )
        images.extend(output.images)  # pyright: ignore[reportAttributeAccessIssue]
    shown = [index for index in range(len(captions)) if index % per_skill < 8][:36]
    target = work_dir / "samples" / f"{step:06d}.png"
    target.parent.mkdir(exist_ok=True)
    tile_with_captions([images[i] for i in shown], [captions[i] for i in shown], columns=6).save(target)
    logger.info("unet: samples in %s", target)
    if judge_dir.exists():
        from selma_ray.miniature.pretrain.score import score_images

        logger.info("unet: %s", score_images(judge_dir, captions, images))


def tile_with_captions(images: list[Image.Image], captions: list[str], columns: int) -> Image.Image:
    """Lay images out on a sheet, each with its caption below."""
    lines = [
        "\n".join(caption[start : start + 22] for start in range(0, min(len(caption), 66), 22)) for caption in captions
    ]
    starts = range(0, len(images), columns)
    return picture_grid(
        [images[start : start + columns] for start in starts],
        _CELL_PX,
        captions=[lines[start : start + columns] for start in starts],
    )
