"""What the engine is asked for: one image, by which weights, and shown how often on the way."""

from dataclasses import dataclass

from selma_ray.adapters.mixes import Mix
from selma_ray.models.drawing import Drawing

__all__ = ["MERGED", "ImageRequest"]

MERGED = None
"""In place of a mix: the merged model, whose weights are baked."""


@dataclass(frozen=True)
class ImageRequest(Drawing):
    """One image to draw for a client."""

    mix: Mix | None = MERGED
    num_previews: int = 0
    """Unfinished images to hand out on the way, evenly over the steps."""
    run: str = ""
    """Which run of serving.models draws it; none: the service's own."""
