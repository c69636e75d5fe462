"""Images as CLIP and BLIP were trained to see them: PIL's bicubic resizing, and normalised floats.

Shapes: N images, C colours, H and W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Preprocess", "crop_evenly", "crop_to_floor", "pad_to_square", "to_pixels"]

Preprocess = Callable[[Image.Image, int], Image.Image]

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def crop_evenly(image: Image.Image, size_px: int) -> Image.Image:
    """Resize the shorter side to `size_px` and crop the centre; a half pixel goes to the even side, as in torchvision."""
    return _resize_and_crop(image, size_px, lambda room: round(room / 2))


def crop_to_floor(image: Image.Image, size_px: int) -> Image.Image:
    """Resize the shorter side to `size_px` and crop the centre; a half pixel is cut off, as in transformers."""
    return _resize_and_crop(image, size_px, lambda room: room // 2)


def pad_to_square(image: Image.Image, size_px: int) -> Image.Image:
    """Resize the longer side to `size_px` and pad with black evenly, as HPSv2's open_clip does."""
    scale = size_px / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((max(width, 1), max(height, 1)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size_px, size_px))
    square.paste(resized, ((size_px - width) // 2, (size_px - height) // 2))
    return square


def to_pixels(images: Sequence[Image.Image], size_px: int, preprocess: Preprocess) -> NDArray[np.float32]:
    """Return normalised pixels [N, C, H, W]."""
    arrays = [np.asarray(preprocess(image.convert("RGB"), size_px), dtype=np.float64) for image in images]
    normalised = (np.stack(arrays) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32)


def _resize_and_crop(image: Image.Image, size_px: int, half: Callable[[int], int]) -> Image.Image:
    width, height = image.size
    if width <= height:
        resized = image.resize((size_px, int(size_px * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(size_px * width / height), size_px), Image.Resampling.BICUBIC)
    left, top = half(resized.width - size_px), half(resized.height - size_px)
    return resized.crop((left, top, left + size_px, top + size_px))
