"""How training images are rendered (SELMA, section 3.2)."""

from pydantic import Field

from selma_ray.config import StrictModel
from selma_ray.models.config import SamplingConfig

__all__ = ["ImagesConfig"]


class ImagesConfig(StrictModel):
    """How the model renders its own training images."""

    sampling: SamplingConfig = SamplingConfig()
    """How each image is sampled."""
    per_prompt: int = Field(default=1, ge=1)
    """Images rendered for each prompt."""
    batch_size: int = Field(default=8, ge=1)
    """Images one pipeline call renders."""
    min_renderers: int = Field(default=1, ge=1)
    """Smallest number of renderer actors."""
    max_renderers: int = Field(default=1, ge=1)
    """Largest number of renderer actors; the pool autoscales between the two."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of a renderer."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a renderer; 0 renders on the CPU."""
    max_attempts: int = Field(default=3, ge=1)
    """Times a row is tried before it is recorded as failed."""
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of failed images above which the stage stops."""
