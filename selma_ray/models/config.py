"""Which text-to-image model a run starts from, and how it is sampled."""

from typing import Literal

from pydantic import Field

from selma_ray.config import StrictModel

__all__ = ["ModelConfig", "SamplingConfig"]


class ModelConfig(StrictModel):
    """A text-to-image model."""

    name: str = "miniature"
    """`miniature`, a local folder in diffusers' format, or a hub name."""
    revision: str | None = None
    """Hub revision; default: the newest."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of rendering."""
    variant: str | None = None
    """File variant on the hub, such as fp16."""


class SamplingConfig(StrictModel):
    """How an image is sampled."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    scheduler: str | None = None
    """diffusers class name such as DDIMScheduler; default: the model's own."""
    negative_prompt: str = ""
    """What the images should not show."""
    width_px: int = Field(default=512, ge=8, multiple_of=8)
    """Image width in pixels."""
    height_px: int = Field(default=512, ge=8, multiple_of=8)
    """Image height in pixels."""
