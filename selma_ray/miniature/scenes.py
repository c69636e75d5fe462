"""Scenes of one or two groups of equal objects, and how they are drawn on 64 x 64 pixels."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from selma_ray.miniature.sprites import render_sprite

__all__ = [
    "BACKGROUNDS",
    "IMAGE_SIZE_PX",
    "INVERSE",
    "MAX_OBJECTS",
    "RELATIONS",
    "STYLES",
    "Group",
    "Relation",
    "Scene",
    "Spot",
    "paint_scene",
    "place_objects",
    "render_scene",
]

IMAGE_SIZE_PX = 64
MAX_OBJECTS = 4

Relation = Literal["left_of", "right_of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left_of", "right_of", "above", "below")
INVERSE: dict[Relation, Relation] = {"left_of": "right_of", "right_of": "left_of", "above": "below", "below": "above"}
BACKGROUNDS: tuple[str, ...] = ("plain", "meadow", "beach", "night sky", "snow", "table")
STYLES: tuple[str, ...] = ("drawing", "pencil sketch", "pixel art", "watercolor")


@dataclass(frozen=True)
class Group:
    """Equal objects of one colour."""

    object: str
    colour: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """What an image shows: one or two groups of different objects, where they are, and how they are drawn.

    `relation` says where the first group is seen from the second; None leaves the arrangement open.
    """

    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: str = "plain"
    style: str = "drawing"


@dataclass(frozen=True)
class Spot:
    """Where one object of a group lies: its centre and side in pixels."""

    group: Group
    x: float
    y: float
    size_px: int


# Centres in a cell's unit square and the object's side in pixels, by count: alone on the canvas, in the left or right
# half of it (32 x 64), in the upper or lower half of it (64 x 32).
_Layout = tuple[int, tuple[tuple[float, float], ...]]
_ALONE: dict[int, _Layout] = {
    1: (40, ((0.5, 0.5),)),
    2: (29, ((0.26, 0.5), (0.74, 0.5))),
    3: (27, ((0.27, 0.28), (0.73, 0.28), (0.5, 0.74))),
    4: (27, ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))),
}
_TALL: dict[int, _Layout] = {
    1: (29, ((0.5, 0.5),)),
    2: (26, ((0.5, 0.27), (0.5, 0.73))),
    3: (20, ((0.5, 0.18), (0.5, 0.5), (0.5, 0.82))),
}
_WIDE: dict[int, _Layout] = {count: (size, tuple((y, x) for x, y in spots)) for count, (size, spots) in _TALL.items()}


def place_objects(scene: Scene, rng: random.Random) -> list[Spot]:
    """Choose a centre and a size for every object of a scene."""
    size = IMAGE_SIZE_PX
    if len(scene.groups) == 1:
        return _place(scene.groups[0], _ALONE, (0, 0, size, size), rng)
    relation = scene.relation or rng.choice(RELATIONS)
    half = size // 2
    if relation in ("left_of", "right_of"):
        layouts, cells = _TALL, [(0, 0, half, size), (half, 0, half, size)]
    else:
        layouts, cells = _WIDE, [(0, 0, size, half), (0, half, size, half)]
    if relation in ("right_of", "below"):
        cells.reverse()
    return [spot for group, cell in zip(scene.groups, cells, strict=True) for spot in _place(group, layouts, cell, rng)]


def _place(
    group: Group, layouts: dict[int, _Layout], cell: tuple[int, int, int, int], rng: random.Random
) -> list[Spot]:
    size_px, spots = layouts[group.count]
    left, top, width, height = cell
    return [
        Spot(
            group,
            left + x * width + rng.uniform(-1.5, 1.5),
            top + y * height + rng.uniform(-1.5, 1.5),
            size_px + rng.randint(-1, 1),
        )
        for x, y in spots
    ]


def render_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as a 64 x 64 RGB image; `rng` jitters places and sizes by a pixel or two."""
    return paint_scene(scene, place_objects(scene, rng), rng)


def paint_scene(scene: Scene, spots: list[Spot], rng: random.Random) -> Image.Image:
    """Draw a scene whose objects are placed already."""
    canvas = _BACKGROUND_PAINTERS[scene.background](rng)
    for spot in spots:
        sprite = render_sprite(spot.group.object, spot.group.colour, spot.size_px)
        corner = (round(spot.x - spot.size_px / 2), round(spot.y - spot.size_px / 2))
        canvas.paste(sprite, corner, sprite)
    return _STYLE_FILTERS[scene.style](canvas)


def _blank(colour: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), colour)
    return canvas, ImageDraw.Draw(canvas)


def _paint_plain(rng: random.Random) -> Image.Image:
    return _blank((244, 244, 240))[0]


def _paint_meadow(rng: random.Random) -> Image.Image:
    canvas, draw = _blank((170, 215, 250))
    draw.rectangle((0, 30 + rng.randint(-1, 1), 64, 64), fill=(165, 225, 120))
    for x in range(2, 64, 8):
        draw.line((x, 62, x + 2, 57), fill=(110, 190, 80))
    return canvas


def _paint_beach(rng: random.Random) -> Image.Image:
    canvas, draw = _blank((185, 225, 250))
    horizon = 18 + rng.randint(-1, 1)
    draw.rectangle((0, horizon, 64, 36), fill=(80, 190, 215))
    draw.rectangle((0, 36, 64, 64), fill=(245, 220, 160))
    draw.line((0, 36, 64, 36), fill=(250, 250, 250), width=2)
    return canvas


def _paint_night_sky(rng: random.Random) -> Image.Image:
    canvas, draw = _blank((28, 30, 78))
    draw.ellipse((50, 3, 60, 13), fill=(250, 245, 200))
    for x, y in ((5, 6), (20, 3), (36, 8), (4, 30), (60, 28), (32, 34), (8, 56), (30, 60), (56, 58)):
        draw.rectangle((x, y, x + 1, y + 1), fill=(240, 240, 220))
    return canvas


def _paint_snow(rng: random.Random) -> Image.Image:
    canvas, draw = _blank((175, 195, 220))
    draw.rectangle((0, 38 + rng.randint(-1, 1), 64, 64), fill=(250, 252, 255))
    for x, y in ((4, 4), (18, 10), (32, 3), (46, 9), (58, 4), (10, 20), (54, 20), (3, 32), (60, 33), (32, 30)):
        draw.ellipse((x - 1, y - 1, x + 2, y + 2), fill=(250, 252, 255))
    return canvas


def _paint_table(rng: random.Random) -> Image.Image:
    canvas, draw = _blank((205, 165, 115))
    for y in range(rng.randint(6, 9), 64, 12):
        draw.line((0, y, 64, y), fill=(170, 125, 80))
    return canvas


def _to_drawing(canvas: Image.Image) -> Image.Image:
    return canvas


def _to_pencil_sketch(canvas: Image.Image) -> Image.Image:
    """Pale colours under hatching, with dark edges, on grey paper."""
    paper = Image.new("RGB", canvas.size, (225, 225, 220))
    pale = Image.blend(paper, canvas, 0.45)
    draw = ImageDraw.Draw(pale, "RGBA")
    for offset in range(-64, 64, 4):
        draw.line((offset, 64, offset + 64, 0), fill=(90, 90, 95, 120))
    edges = canvas.convert("L").filter(ImageFilter.CONTOUR).convert("RGB")
    return ImageChops.darker(pale, edges)


def _to_pixel_art(canvas: Image.Image) -> Image.Image:
    """Blocks of three pixels in few colours."""
    blocks = canvas.resize((22, 22), Image.Resampling.BOX)
    levels = blocks.point(lambda value: min(255, round(value / 51) * 51))
    return levels.resize((66, 66), Image.Resampling.NEAREST).crop((1, 1, 65, 65))


def _to_watercolor(canvas: Image.Image) -> Image.Image:
    """Soft washes on white paper, with the sheet's border left empty."""
    wash = canvas.filter(ImageFilter.GaussianBlur(1.3))
    sheet = Image.new("RGB", canvas.size, (255, 255, 255))
    mask = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((3, 3, 60, 60), 8, fill=255)
    sheet.paste(wash, (0, 0), mask.filter(ImageFilter.GaussianBlur(1.5)))
    return sheet


_BACKGROUND_PAINTERS: dict[str, Callable[[random.Random], Image.Image]] = {
    "plain": _paint_plain,
    "meadow": _paint_meadow,
    "beach": _paint_beach,
    "night sky": _paint_night_sky,
    "snow": _paint_snow,
    "table": _paint_table,
}
_STYLE_FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "drawing": _to_drawing,
    "pencil sketch": _to_pencil_sketch,
    "pixel art": _to_pixel_art,
    "watercolor": _to_watercolor,
}
