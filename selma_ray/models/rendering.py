"""A text-to-image pipeline that renders rows: one prompt and one seed each, whatever batch they come in."""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from peft import PeftModel
from PIL import Image

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.locate import locate_text_to_image

__all__ = ["CPU_LANES", "DTYPES", "Renderer", "denoiser_of", "load_pipeline", "use_scheduler"]

CPU_LANES = 4
"""Rows a CPU denoises at once: as fast there as any larger number."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


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
        adapted = PeftModel.from_pretrained(denoiser_of(pipeline), str(adapter_dir)).merge_and_unload()
        pipeline.register_modules(**{"unet" if getattr(pipeline, "unet", None) is not None else "transformer": adapted})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the part of a pipeline that predicts noise: its UNet or its transformer."""
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


class Renderer:
    """Renders batches with one pipeline held in memory; a batch that does not fit is halved.

    The image of a row depends on its prompt and its seed alone. In fp32 on the CPU that holds to the byte: rows are denoised
    `CPU_LANES` at a time, the last ones filled up, because kernels round differently for other batch sizes (by up to one
    step of 255). On GPUs, and in bf16 and fp16, it holds up to rounding.
    """

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        use_scheduler(pipeline, sampling.scheduler)

    @property
    def scheduler(self) -> str:
        """Return the class name of the sampler."""
        return type(self.pipeline.scheduler).__name__

    def render(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return one RGB image per prompt, in order."""
        if self.pipeline.device.type == "cpu":
            lanes = range(0, len(prompts), CPU_LANES)
            return [
                image
                for at in lanes
                for image in self._filled_up(prompts[at : at + CPU_LANES], seeds[at : at + CPU_LANES])
            ]
        return self._halving(prompts, seeds)

    def _filled_up(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Render up to CPU_LANES rows as that many, by repeating the last."""
        missing = CPU_LANES - len(prompts)
        all_prompts, all_seeds = list(prompts), list(seeds)
        return self._halving(all_prompts + all_prompts[-1:] * missing, all_seeds + all_seeds[-1:] * missing)[
            : len(prompts)
        ]

    def _halving(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        try:
            return self._render(prompts, seeds)
        except RuntimeError as error:
            if len(prompts) == 1 or not _is_out_of_memory(error):
                raise
            logger.warning("%d images at once do not fit the memory; they are halved", len(prompts))
        gc.collect()
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._halving(prompts[:half], seeds[:half]) + self._halving(prompts[half:], seeds[half:])

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
    """Give a pipeline the scheduler class `name`, with its own scheduler's configuration; none keeps its own.

    Raises ConfigError for a class that cannot take that configuration, such as a diffusion sampler for a flow model.
    """
    own = pipeline.scheduler
    if name is None or name == type(own).__name__:
        return
    compatible = {scheduler_class.__name__: scheduler_class for scheduler_class in own.compatibles}
    if name not in compatible:
        raise ConfigError(
            f"sampling.scheduler must be a diffusers scheduler that fits the model ({', '.join(sorted(compatible))}), got {name!r}"
        )
    pipeline.scheduler = compatible[name].from_config(own.config)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
