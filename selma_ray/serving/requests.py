"""What the engine is asked for: one image, sampled in its own way."""

from dataclasses import dataclass

__all__ = ["ImageRequest"]


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

    @property
    def size_px(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.height_px, self.width_px
