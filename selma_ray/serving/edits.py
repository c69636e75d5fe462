"""POST /v1/images/edits: an uploaded image that is changed as a whole, or where its mask is transparent."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image

from selma_ray.models.drawing import Source
from selma_ray.serving.bodies import EditBody
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import decode_alpha, decode_upload
from selma_ray.serving.errors import invalid_request
from selma_ray.serving.requests import ImageRequest

__all__ = ["FILES", "edit_requests", "fitting_size_px"]

FILES = ("image", "mask")
"""The files of an edit's form."""

_DEFAULT_STRENGTH = 0.8
_DEFAULT_STRENGTH_IN_MASK = 1.0
_SIDE_UNIT_PX = 16  # which every family can draw
_DECODING = threading.Lock()


def edit_requests(
    body: EditBody, requests: Sequence[ImageRequest], files: Mapping[str, Sequence[bytes]], config: ServingConfig
) -> tuple[list[ImageRequest], list[str]]:
    """Return what `requests`, those of the body, change, and warnings; raises RequestError for files out of bounds. It takes a while."""
    if "image" not in files:
        raise invalid_request("missing required parameter: image; send a file", "image", "missing_required_parameter")
    if len(files.get("mask", ())) > 1:
        raise invalid_request("mask is given twice; give it once", "mask")
    warnings = []
    if len(files["image"]) > 1:
        warnings.append(f"image: the first of {len(files['image'])} is changed, the others are ignored")
    # Decoders hold a few times what an image takes: one at a time, whoever sent it.
    with _DECODING:
        image = decode_upload(files["image"][0], config.max_upload_pixels, config.upload_background)
        mask = _mask(files["mask"][0], image, config) if "mask" in files else None
        if mask is None and decode_alpha(files["image"][0], config.max_upload_pixels) is not None:
            warnings.append(
                f"image: transparent pixels are seen upon {config.upload_background}; to draw them alone, send a mask"
            )
    first = requests[0]
    size_px = fitting_size_px(image.size, config) if body.size in (None, "auto") else (first.width_px, first.height_px)
    strength = body.strength or (_DEFAULT_STRENGTH if mask is None else _DEFAULT_STRENGTH_IN_MASK)
    source = Source(
        image if image.size == size_px else image.resize(size_px, Image.Resampling.LANCZOS),
        strength,
        None if mask is None else mask.resize(size_px, Image.Resampling.NEAREST),
    )
    width_px, height_px = size_px
    changed = [replace(request, width_px=width_px, height_px=height_px, source=source) for request in requests]
    return changed, warnings


def _mask(content: bytes, image: Image.Image, config: ServingConfig) -> Image.Image:
    """Return where an image is drawn anew, white, from a file whose transparent pixels say so."""
    alpha = decode_alpha(content, config.max_upload_pixels, "mask")
    if alpha is None:
        raise invalid_request(
            "mask must be an image with transparent pixels, where the image is drawn anew; this one has none",
            "mask",
            "invalid_image",
        )
    if alpha.size != image.size:
        raise invalid_request(
            f"mask must have the size of the image, {image.width}x{image.height}, got {alpha.width}x{alpha.height}",
            "mask",
        )
    return alpha.point(lambda opacity: 255 if opacity < 128 else 0)


def fitting_size_px(size_px: tuple[int, int], config: ServingConfig) -> tuple[int, int]:
    """Return (width, height) where no size is asked for: the image's own where that can be drawn, else its proportions.

    It then has about as many pixels as an image of the default size.
    """
    if all(side % _SIDE_UNIT_PX == 0 and side <= config.longest_side_px for side in size_px):
        return size_px
    scale = (config.sampling.width_px * config.sampling.height_px / (size_px[0] * size_px[1])) ** 0.5
    scale = min(scale, config.longest_side_px / max(size_px))
    most = config.longest_side_px // _SIDE_UNIT_PX
    width, height = (min(max(1, round(side * scale / _SIDE_UNIT_PX)), most) for side in size_px)
    return width * _SIDE_UNIT_PX, height * _SIDE_UNIT_PX
