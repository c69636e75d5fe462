"""What the engine is asked for: one image, sampled in its own way."""

from dataclasses import dataclass

from selma_ray.adapters.mixing import Mix

__all__ = ["MERGED", "ImageRequest"]

MERGED = None
"""In place of a mix: the merged model, whose weights are baked."""


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw; it depends on these values alone, never on what else is being drawn."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width_px: int
    height_px: int
    negative_prompt: str = ""
    mix: Mix | None = MERGED
    num_previews: int = 0
    """Unfinished images to hand out on the way, evenly over the steps."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.height_px, self.width_px
