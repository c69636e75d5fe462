"""What one image is drawn from: the same values give the same image, whatever else is being drawn."""

import math
from dataclasses import dataclass

from PIL import Image

__all__ = ["Drawing", "Source"]


@dataclass(frozen=True, eq=False)
class Source:
    """An image that is changed in place of drawing one from noise alone (SDEdit, 2108.01073)."""

    image: Image.Image
    """RGB, of the drawing's size."""
    strength: float
    """How much of the steps is taken, above 0 to 1: with 1 little or nothing of the image stays."""
    mask: Image.Image | None = None
    """Grey, of the drawing's size: white is drawn anew, black stays as it is; default: all may change."""

    def kept(self, drawn: Image.Image) -> Image.Image:
        """Return what was drawn with everything outside the mask as it was."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


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
    source: Source | None = None
    """What is changed; default: the image is drawn from noise."""

    @property
    def steps_to_take(self) -> int:
        """Return how many of the steps are taken: of a change only the last ones, about its strength's part."""
        return self.steps if self.source is None else max(1, math.ceil(self.steps * self.source.strength))

    @property
    def size_px(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.height_px, self.width_px
