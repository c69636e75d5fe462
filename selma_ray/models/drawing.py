"""What one image is drawn from: the same values give the same image, whatever else is being drawn."""

from dataclasses import dataclass

__all__ = ["Drawing"]


@dataclass(frozen=True)
class Drawing:
    """One image to draw; it depends on these values alone."""

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
