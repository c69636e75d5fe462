"""A text-to-image pipeline that renders rows: one prompt and one seed each, whatever batch they come in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image

from selma_ray.errors import ModelNotFoundError, first_line
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import predictor_class
from selma_ray.models.locate import locate_text_to_image
from selma_ray.models.long_prompts import read_in_chunks
from selma_ray.models.parts import DTYPES, not_finite, replaced_autoencoder
from selma_ray.models.placing import place_pipeline
from selma_ray.models.schedulers import use_scheduler

__all__ = ["CPU_LANES", "Renderer", "load_pipeline", "open_pipeline"]

CPU_LANES = 4
"""Rows a CPU denoises at once: as fast there as any larger number."""


def load_pipeline(model: ModelConfig, device: torch.device | str) -> DiffusionPipeline:
    """Load a pipeline onto a device, kept there as `model.card` says."""
    return place_pipeline(open_pipeline(model), model, device)


def open_pipeline(model: ModelConfig) -> DiffusionPipeline:
    """Load a pipeline into the host's memory."""
    located = locate_text_to_image(model.name, model.revision)
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            located.path,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=DTYPES[model.dtype],
            use_safetensors=True,
            **replaced_autoencoder(model),
        )
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model.name {model.name} cannot be opened ({first_line(error)}); give a diffusers folder"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return read_in_chunks(pipeline, model.text_chunks)


class Renderer:
    """Renders batches with one pipeline held in memory; a batch that does not fit is halved.

    The image of a row depends on its prompt and its seed alone. In fp32 on the CPU that holds to the byte: rows are denoised
    `CPU_LANES` at a time (one where texts have any length), the last ones filled up, because kernels round differently for other batch
    sizes (by up to one step of 255). On GPUs, and in bf16 and fp16, it holds up to rounding. A safety checker of the pipeline is
    taken out.
    """

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        self._batches = HalvingBatches()
        self._family = predictor_class(type(pipeline).__name__)
        # A text that is filled up to the longest of its batch is rounded by what is beside it.
        self._cpu_lanes = 1 if self._family.texts_vary else CPU_LANES
        use_scheduler(pipeline, sampling.scheduler, sampling.scheduler_config)
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None  # it answers with black images, which would be learnt from and scored

    @property
    def scheduler(self) -> str:
        """Return the class name of the sampler."""
        return type(self.pipeline.scheduler).__name__

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int] | None = None
    ) -> list[Image.Image]:
        """Return one RGB image per prompt, in order, all of a size (width, height); default: the sampling's."""
        size_px = size_px or (self.sampling.width_px, self.sampling.height_px)
        if self.pipeline._execution_device.type != "cpu":  # its parts may wait in the host's memory
            return self._fitting(prompts, seeds, size_px)
        images: list[Image.Image] = []
        lanes = self._cpu_lanes
        for start in range(0, len(prompts), lanes):
            images += self._filled_up(prompts[start : start + lanes], seeds[start : start + lanes], size_px)
        return images

    def _filled_up(self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int]) -> list[Image.Image]:
        """Render up to as many rows as a CPU denoises at once as that many, by repeating the last."""
        missing = self._cpu_lanes - len(prompts)
        all_prompts, all_seeds = list(prompts), list(seeds)
        filled = self._fitting(all_prompts + all_prompts[-1:] * missing, all_seeds + all_seeds[-1:] * missing, size_px)
        return filled[: len(prompts)]

    def _fitting(self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int]) -> list[Image.Image]:
        """Render as many rows at once as fit the memory; what did not fit once is not tried again."""
        return self._batches.map(
            lambda rows: self._render([prompt for prompt, _ in rows], [seed for _, seed in rows], size_px),
            list(zip(prompts, seeds, strict=True)),
        )

    @torch.inference_mode()
    def _render(self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int]) -> list[Image.Image]:
        """Return images; raises RenderError where one is not finite, which a conversion to pixels would make black."""
        with _autoencoder_restored(self.pipeline):
            images_NHW3 = self._draw(prompts, seeds, size_px)
        if not np.isfinite(images_NHW3).all():
            raise not_finite(self.pipeline.dtype)
        return self.pipeline.numpy_to_pil(images_NHW3)

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int]) -> Any:
        """Return images (NHW3, 0 to 1)."""
        width_px, height_px = size_px
        return self.pipeline(
            prompt=list(prompts),
            num_inference_steps=self.sampling.steps,
            width=width_px,
            height=height_px,
            # Noise is drawn on the CPU, so that a seed gives the same latents on every device.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **self._family.call_arguments(self.pipeline, self.sampling, len(prompts)),
        ).images


@contextmanager
def _autoencoder_restored(pipeline: Any) -> Iterator[None]:
    """Give the autoencoder its precision back: diffusers leaves one that it upcasts in fp32 where decoding runs out of memory."""
    autoencoder = getattr(pipeline, "vae", None)
    dtype = autoencoder.dtype if autoencoder is not None else None
    try:
        yield
    finally:
        if autoencoder is not None and autoencoder.dtype != dtype:
            autoencoder.to(dtype=dtype)
