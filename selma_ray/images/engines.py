"""What draws images: a diffusers pipeline, or the stand-in that costs nothing."""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

from selma_ray.images.config import FreeEngineConfig, ImagesConfig
from selma_ray.models.config import ModelConfig, SamplingConfig

__all__ = ["FreeEngine", "ImageEngine", "open_engine"]


class ImageEngine(Protocol):
    """Draws an image for each prompt and seed; an image depends on these two alone, not on its batch."""

    @property
    def scheduler(self) -> str:
        """Return the name of the sampler, as result rows show it."""
        ...

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int] | None = None
    ) -> list[Image.Image]:
        """Return one RGB image per prompt, in order, all of a size (width, height); default: the sampling's."""
        ...


class FreeEngine:
    """Draws a colour ramp whose offset is the seed, with grain for a PNG of natural size, after a wait that may be zero."""

    scheduler = "free"

    def __init__(self, config: FreeEngineConfig, sampling: SamplingConfig) -> None:
        self._latency_s = config.latency_s
        self._size_px = sampling.width_px, sampling.height_px

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], size_px: tuple[int, int] | None = None
    ) -> list[Image.Image]:
        """Return a ramp per prompt."""
        if self._latency_s:
            time.sleep(self._latency_s)
        ramp_HW3 = _draw_ramp(*(size_px or self._size_px))
        return [Image.fromarray(ramp_HW3 + np.uint8(seed % 256)) for seed in seeds]


@lru_cache
def _draw_ramp(width_px: int, height_px: int) -> np.ndarray:
    ramp_HW = np.add.outer(np.arange(height_px), np.arange(width_px))
    ramp_HW3 = np.stack([ramp_HW, 2 * ramp_HW, 255 - ramp_HW], axis=-1)
    return (ramp_HW3 + np.random.default_rng(0).integers(0, 16, ramp_HW3.shape)).astype(np.uint8)


def open_engine(config: ImagesConfig, model: ModelConfig) -> ImageEngine:
    """Load the engine that `config` names, for use in the calling thread; raises ConfigError where it cannot be loaded."""
    if config.engine == "free":
        return FreeEngine(config.free, config.sampling)
    # The driver ships this function to the renderers without loading torch.
    import torch

    from selma_ray.models.device import device_of
    from selma_ray.models.rendering import Renderer, load_pipeline

    torch.set_num_threads(max(1, int(config.num_cpus)))
    return Renderer(load_pipeline(model, device_of(config.num_gpus, "images.num_gpus")), config.sampling)
