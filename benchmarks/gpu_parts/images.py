"""How far images are from one another."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["difference"]


def difference(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> dict[str, float]:
    """Return the largest and the mean difference of pixels, of 255."""
    between = [
        np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int))
        for image, other in zip(images, others, strict=True)
    ]
    return {
        "max_of_255": int(max(each.max() for each in between)),
        "mean_of_255": round(float(np.mean([each.mean() for each in between])), 4),
    }
