"""Pictures of pictures: models side by side, contact sheets, thumbnails."""

import base64
import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet", "data_uri", "png_bytes", "side_by_side", "thumbnail"]

_GAP_PX = 6
_LABEL_PX = 84
_PAPER = (255, 255, 255)
_INK = (60, 60, 60)


def side_by_side(rows: Mapping[str, Sequence[Image.Image]], cell_px: int = 128) -> Image.Image:
    """Return one labelled row of images per model; the images of a column share prompt and seed."""
    columns = max(len(images) for images in rows.values())
    width = _LABEL_PX + columns * (cell_px + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, len(rows) * (cell_px + _GAP_PX) + _GAP_PX), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    for row, (label, images) in enumerate(rows.items()):
        top = _GAP_PX + row * (cell_px + _GAP_PX)
        draw.text((_GAP_PX, top + cell_px / 2), label, fill=_INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(thumbnail(image, cell_px), (_LABEL_PX + column * (cell_px + _GAP_PX), top))
    return sheet


def contact_sheet(images: Sequence[Image.Image], columns: int, cell_px: int = 96) -> Image.Image:
    """Return images in rows of `columns`, on a transparent ground."""
    rows = -(-len(images) // columns)
    gap = _GAP_PX // 2
    sheet = Image.new("RGBA", (columns * (cell_px + gap) - gap, max(rows, 1) * (cell_px + gap) - gap), (0, 0, 0, 0))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(thumbnail(image, cell_px), (column * (cell_px + gap), row * (cell_px + gap)))
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
        return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
    buffer = io.BytesIO()
    thumbnail(image, max_side_px).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
