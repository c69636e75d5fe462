"""Images to bytes for answers, and bytes from strangers to images."""

import base64
import binascii
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from selma_ray.serving.errors import RequestError, invalid_request, too_large
from selma_ray.serving.metadata import PARAMETERS

__all__ = [
    "PNG",
    "FileFormat",
    "OutputFormat",
    "base64_of",
    "bytes_of_base64",
    "count_pixels",
    "decode_alpha",
    "decode_upload",
    "encode",
    "reencode",
]

logger = logging.getLogger(__name__)

OutputFormat = Literal["png", "webp", "jpeg"]

_ACCEPTED = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class FileFormat:
    """How an image is written."""

    kind: OutputFormat = "png"
    quality: int = 95
    """Of WebP and JPEG, 0 to 100; PNG is lossless."""


PNG = FileFormat()


def encode(image: Image.Image, file_format: FileFormat, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the image's file, with `metadata` in it: all of it in PNG, its `parameters` as the Exif comment of the others."""
    buffer = io.BytesIO()
    if file_format.kind == "png":
        options: dict[str, Any] = {"compress_level": 4, "pnginfo": _text_chunks(metadata or {})}
    else:
        options = {"quality": file_format.quality, "exif": _comment((metadata or {}).get(PARAMETERS, ""))}
    image.save(buffer, format=file_format.kind.upper(), **options)
    return buffer.getvalue()


def reencode(content: bytes, file_format: FileFormat) -> bytes:
    """Return a PNG file of our own in another format, with the metadata that it has."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return encode(image, file_format, getattr(image, "text", {}))


def _text_chunks(metadata: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        chunks.add_text(name, text.replace("\0", ""))  # which would end the text
    return chunks


def _comment(text: str) -> Image.Exif:
    exif = Image.Exif()
    if text:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def base64_of(content: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(content).decode()


def bytes_of_base64(text: str, param: str) -> bytes:
    """Return the bytes of base64 text, bare or in a data: URL; raises RequestError (400) for anything else."""
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        # Many writers break lines, as MIME has it.
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid_request(f"{param} must be a file in base64", param, "invalid_image") from None


def decode_upload(content: bytes, max_pixels: int, background: str = "white") -> Image.Image:
    """Return the image in a file from a stranger, in RGB as a person sees it: turned as its camera says, upon a background.

    Its size is checked before any pixel is decoded. Raises RequestError: 400 where it is no sound PNG, JPEG or WebP, 413 where it
    has more than `max_pixels` pixels.
    """
    with _refusals(max_pixels):
        _open(content, max_pixels).verify()
        # A verified image cannot be decoded: it is opened again.
        return _as_seen(_open(content, max_pixels), background)


def decode_alpha(content: bytes, max_pixels: int, param: str = "image") -> Image.Image | None:
    """Return the opacity of an image in a file from a stranger, turned as its camera says; None where all of it is opaque.

    Raises RequestError as `decode_upload` does, about `param`.
    """
    with _refusals(max_pixels, param):
        _open(content, max_pixels, param).verify()
        image = ImageOps.exif_transpose(_open(content, max_pixels, param))
        if not image.has_transparency_data:
            return None
        alpha = image.convert("RGBA").getchannel("A")
        return alpha if alpha.getextrema() != (255, 255) else None


def count_pixels(content: bytes, max_pixels: int) -> int:
    """Return how many pixels a file from a stranger has, by its header alone; raises RequestError as `decode_upload` does."""
    with _refusals(max_pixels):
        image = _open(content, max_pixels)
        return image.width * image.height


@contextmanager
def _refusals(max_pixels: int, param: str = "image") -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise too_large(_too_many_pixels(max_pixels, param), param) from None
    except Exception as error:  # Decoders raise whatever a broken file makes them stumble over.
        logger.info("an uploaded image was refused: %s", type(error).__name__)
        raise invalid_request(f"{param} must be a whole PNG, JPEG or WebP file", param, "invalid_image") from None


def _open(content: bytes, max_pixels: int, param: str = "image") -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=_ACCEPTED)
    if image.width * image.height > max_pixels:
        raise too_large(_too_many_pixels(max_pixels, param), param)
    return image


def _as_seen(image: Image.Image, background: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which a conversion would cut off at 255
        image = image.point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        shown = Image.new("RGBA", image.size, background)
        shown.alpha_composite(image.convert("RGBA"))
        image = shown
    return image.convert("RGB")


def _too_many_pixels(max_pixels: int, param: str) -> str:
    return f"{param} must have at most {max_pixels} pixels; send a smaller one"
