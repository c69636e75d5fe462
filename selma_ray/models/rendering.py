"""A text-to-image pipeline that renders rows: one prompt and one seed each, whatever batch they come in."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from peft import PeftModel
from PIL import Image

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.locate import locate_text_to_image

__all__ = ["DTYPES", "Renderer", "denoiser_of", "load_pipeline", "use_scheduler"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(model: ModelConfig, adapter_dir: str | Path | None = None) -> DiffusionPipeline:
    """Load a pipeline on the best device, with a PEFT adapter folder folded into its denoiser where one is given."""
    located = locate_text_to_image(model.name, model.revision)
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            located.path,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=DTYPES[model.dtype],
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"model.name {model.name} cannot be opened ({reason}); give a diffusers folder"
        ) from None
    if adapter_dir is not None:
        denoiser = PeftModel.from_pretrained(denoiser_of(pipeline), str(adapter_dir))
        pipeline.unet = denoiser.merge_and_unload()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the part of a pipeline that predicts noise: its UNet or its transformer."""
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


class Renderer:
    """Renders batches with one pipeline held in memory; a batch that does not fit is halved."""

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        use_scheduler(pipeline, sampling.scheduler)

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return one RGB image per prompt; the image of a row depends on its prompt and its seed alone."""
        try:
            return self._render(prompts, seeds)
        except torch.cuda.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self.render(prompts[:half], seeds[:half]) + self.render(prompts[half:], seeds[half:])

    @torch.inference_mode()
    def _render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        negative = (
            {"negative_prompt": [self.sampling.negative_prompt] * len(prompts)} if self.sampling.negative_prompt else {}
        )
        return self.pipeline(
            prompt=list(prompts),
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            width=self.sampling.width_px,
            height=self.sampling.height_px,
            # Noise is drawn on the CPU, so that a seed gives the same latents on every device.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **negative,
        ).images


def use_scheduler(pipeline: Any, name: str | None) -> None:
    """Give a pipeline the scheduler class `name`, with its own scheduler's configuration; none keeps its own."""
    if name is None:
        return
    scheduler_class = getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or scheduler_class is None:
        raise ConfigError(f"scheduler must be a diffusers scheduler class such as DDIMScheduler, got {name!r}")
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
