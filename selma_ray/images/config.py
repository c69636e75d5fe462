"""How training images are rendered (SELMA, section 3.2)."""

from typing import Literal

from pydantic import Field, model_validator

from selma_ray.config import Placement, StrictModel
from selma_ray.judging.config import JudgeConfig, JudgeSetting
from selma_ray.models.config import SamplingConfig

__all__ = ["FreeEngineConfig", "ImageChoiceConfig", "ImagesConfig"]


class FreeEngineConfig(StrictModel):
    """The stand-in engine that draws a colour ramp from a row's seed: for measuring and testing what is around an engine."""

    latency_s: Placement[float] = Field(default=0.0, ge=0)
    """Seconds that it waits for each batch, as if a GPU rendered it."""


class ImageChoiceConfig(StrictModel):
    """Which of a prompt's images are trained on; the others are kept beside them as split `rejected`, all with scores."""

    judge: JudgeSetting = JudgeConfig()
    """The judge whose score in [0, 1] decides: its name, or its settings as those of evaluation.judge."""
    judges: Placement[int] = Field(default=0, ge=0)
    """Judges in actors of their own, which judge once all images are rendered; 0 keeps a judge beside each renderer, in its process,
    wherever the questions are known by then."""
    keep_best: int = Field(default=1, ge=1)
    """Images kept for each prompt, those of the highest scores."""
    min_score: float = Field(default=0, ge=0, le=1)
    """Score below which an image is rejected, even the best of its prompt."""


class ImagesConfig(StrictModel):
    """How the model renders its own training images."""

    engine: Literal["diffusers", "free"] = "diffusers"
    """`diffusers` renders with the model's pipeline; `free` is the stand-in that costs nothing."""
    free: FreeEngineConfig = FreeEngineConfig()
    """The stand-in engine."""
    sampling: SamplingConfig = SamplingConfig()
    """How each image is sampled."""
    buckets_px: tuple[tuple[int, int], ...] = ()
    """Further sizes, [width, height], that images have beside sampling's (aspect-ratio buckets): a prompt's is drawn by its seed. A
    batch, of rendering as of training, is of one size."""
    per_prompt: int = Field(default=1, ge=1)
    """Images rendered for each prompt."""
    selection: ImageChoiceConfig | None = None
    """Choice among a prompt's images by a judge; default: all of them are trained on, as published."""
    format: Literal["png", "webp"] = "png"
    """Encoding of the images; both are lossless."""
    license: Placement[str] = "unknown"
    """Licence of the dataset, as its card names it: an identifier of the Hugging Face hub."""
    batch_size: int = Field(default=8, ge=1)
    """Images one pipeline call renders."""
    min_renderers: Placement[int] = Field(default=1, ge=1)
    """Smallest number of renderer actors."""
    max_renderers: Placement[int] = Field(default=1, ge=1)
    """Largest number of renderer actors; the pool autoscales between the two."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of a renderer."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of a renderer; 0 renders on the CPU."""
    max_attempts: Placement[int] = Field(default=3, ge=1)
    """Times a row is tried before it is recorded as failed, whether it raises an error or ends the renderer's process."""
    max_failed_fraction: Placement[float] = Field(default=0.05, ge=0, le=1)
    """Share of failed images above which the stage stops."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> "ImagesConfig":
        if self.max_renderers < self.min_renderers:
            raise ValueError(
                f"max_renderers must be at least min_renderers={self.min_renderers}, got {self.max_renderers}; raise it"
            )
        if self.selection and self.selection.keep_best > self.per_prompt:
            raise ValueError(
                f"selection.keep_best must be at most per_prompt={self.per_prompt}, "
                f"got {self.selection.keep_best}; raise per_prompt"
            )
        return self

    @model_validator(mode="after")
    def _buckets_are_sizes(self) -> "ImagesConfig":
        for width_px, height_px in self.buckets_px:
            if min(width_px, height_px) < 8 or width_px % 8 or height_px % 8:
                raise ValueError(f"buckets_px must have sides that divide by 8, got {width_px}x{height_px}")
        if len(set(self.sizes_px)) < len(self.sizes_px):
            raise ValueError(
                "buckets_px must be different sizes, and others than sampling's; leave the one out that is there twice"
            )
        return self

    @property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """Return every size (width, height) that images have, sampling's first."""
        return ((self.sampling.width_px, self.sampling.height_px), *self.buckets_px)

    @property
    def samplings(self) -> tuple[SamplingConfig, ...]:
        """Return how images of each size are sampled, in the order of `sizes_px`."""
        return tuple(
            self.sampling.model_copy(update={"width_px": width_px, "height_px": height_px})
            for width_px, height_px in self.sizes_px
        )

    @property
    def largest_sampling(self) -> SamplingConfig:
        """Return how images of the largest size are sampled: what memory and time are planned for."""
        return max(self.samplings, key=lambda sampling: sampling.width_px * sampling.height_px)

    @property
    def rows_per_batch(self) -> int:
        """Return how many images a call of a renderer gets: those of a batch for each size; with a selection, those of whole prompts."""
        rows = self.batch_size * len(self.sizes_px)
        return max(1, rows // self.per_prompt) * self.per_prompt if self.selection else rows
