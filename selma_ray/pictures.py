"""Pictures of pictures: grids, thumbnails, and images inside a page."""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["data_uri", "file_uri", "picture_grid", "png_bytes", "thumbnail"]

_LABEL_PX = 84
_TITLE_PX = 24
_CAPTION_PX = 34
_PAPER = (255, 255, 255)
_INK = (60, 60, 60)


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    cell_px: int,
    *,
    gap_px: int = 6,
    margin_px: int = 6,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    transparent: bool = False,
) -> Image.Image:
    """Return images in rows of square cells, on paper or on a transparent ground.

    A row may have a label to its left or a title above it, an image a caption of up to three short lines below it; a row without captions
    takes no place for them.
    """
    left_px, above_px = _LABEL_PX if labels else margin_px, _TITLE_PX if titles else 0
    below_px = [_CAPTION_PX if captions and any(captions[row]) else 0 for row in range(len(rows))]
    step_x, heights = cell_px + gap_px, [above_px + cell_px + below + gap_px for below in below_px]
    width = left_px + max(map(len, rows), default=0) * step_x - gap_px + margin_px
    height = 2 * margin_px + sum(heights) - gap_px
    ground = ("RGBA", (0, 0, 0, 0)) if transparent else ("RGB", _PAPER)
    sheet = Image.new(ground[0], (max(1, width), max(1, height)), ground[1])
    draw = ImageDraw.Draw(sheet)
    for row, images in enumerate(rows):
        top = margin_px + sum(heights[:row]) + above_px
        if labels:
            middle = (gap_px, top + cell_px / 2)
            draw.text(middle, labels[row], fill=_INK, font=ImageFont.load_default(size=17), anchor="lm")
        if titles:
            draw.text((left_px, top - above_px), titles[row], fill=_INK, font=ImageFont.load_default(size=16))
        for column, image in enumerate(images):
            left = left_px + column * step_x
            sheet.paste(thumbnail(image, cell_px), (left, top))
            if below_px[row]:
                draw.multiline_text((left, top + cell_px), captions[row][column], fill=_INK, spacing=0, font_size=10)
    return sheet


def thumbnail(image: Image.Image, side_px: int) -> Image.Image:
    """Return the image scaled to fit a square; small images are enlarged with their pixels kept sharp."""
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if scale >= 1 and scale == int(scale) else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, resampling)


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image, max_side_px: int = 320) -> str:
    """Return a data URI: PNG as it is for a small image, a JPEG thumbnail for a large one."""
    if max(image.size) <= max_side_px:
        return file_uri(png_bytes(image), "png")
    buffer = io.BytesIO()
    thumbnail(image, max_side_px).save(buffer, format="JPEG", quality=85)
    return file_uri(buffer.getvalue(), "jpeg")


def file_uri(content: bytes, format_: str) -> str:
    """Return the data URI of an image file."""
    return f"data:image/{format_};base64,{base64.b64encode(content).decode()}"
