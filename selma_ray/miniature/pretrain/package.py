"""Writes the trained models as package data: fp16 safetensors in the formats that every loader knows."""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from selma_ray.miniature.detector import MiniatureDetector
from selma_ray.miniature.judge import MiniatureJudge
from selma_ray.miniature.pretrain.model_card import write_model_card
from selma_ray.miniature.pretrain.progress import load_checkpoint
from selma_ray.miniature.pretrain.samples import assemble_pipeline

__all__ = ["SIZE_LIMIT_MB", "package_models"]

logger = logging.getLogger(__name__)

SIZE_LIMIT_MB = 40


def package_models(work_dir: Path, target: Path) -> None:
    """Write `text_to_image/`, `judge/` and `detector/` (where there are such) and MODEL_CARD.md under `target`.

    An earlier checkpoint that was put aside as `unet_weak.pt` becomes `text_to_image_weak/`.

    Raises:
        ValueError: when the models together are larger than `SIZE_LIMIT_MB`.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    denoiser = UNet2DConditionModel.from_pretrained(work_dir / "unet")
    _write_pipeline(work_dir, denoiser, partial / "text_to_image")
    weak = load_checkpoint(work_dir / "unet_weak.pt")
    if weak:
        denoiser.load_state_dict(weak["average"])
        _write_pipeline(work_dir, denoiser, partial / "text_to_image_weak")
    if (work_dir / "judge" / "config.json").exists():
        judge = MiniatureJudge.from_pretrained(work_dir / "judge")
        judge.model.half()
        judge.save_pretrained(partial / "judge")
    if (work_dir / "detector" / "config.json").exists():
        detector = MiniatureDetector.from_pretrained(work_dir / "detector")
        detector.model.half().save_pretrained(partial / "detector")
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)
    size_mb = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) / 1e6
    if size_mb > SIZE_LIMIT_MB:
        raise ValueError(f"package: the models must fit {SIZE_LIMIT_MB} MB, got {size_mb:.1f} MB")
    write_model_card(work_dir, partial / "MODEL_CARD.md")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    logger.info("package: %s, %.1f MB", target, size_mb)


def _write_pipeline(work_dir: Path, denoiser: UNet2DConditionModel, target: Path) -> None:
    pipeline = assemble_pipeline(work_dir, denoiser.float())
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(target, safe_serialization=True)
    for config in target.glob("*/config.json"):
        _forget_origin(config)
    _load_in_float32(target / "text_encoder" / "config.json")


def _forget_origin(config: Path) -> None:
    """Take the folder that a model was loaded from out of its configuration: it names a place on one machine."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _load_in_float32(config: Path) -> None:
    """Make transformers load half-precision weights as float32, as diffusers does with the pipeline's other models."""
    settings = json.loads(config.read_text())
    settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
