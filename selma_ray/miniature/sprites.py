"""Twelve everyday objects drawn by our own code, each recolourable in eight colours.

Every drawing lives on a unit square of 100 x 100 and is rasterised at `SUPERSAMPLED_PX`, then scaled down with a wide
filter, which is what makes edges smooth at 20 pixels. Only the body of an object takes the colour; details (stalks,
wheels, windows) keep their own, so a recoloured object stays recognisable.
"""

from collections.abc import Callable, Sequence
from functools import cache

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "NATURAL_COLOUR", "OBJECTS", "plural", "render_sprite"]

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (222, 36, 36),
    "orange": (255, 140, 20),
    "yellow": (250, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 225),
    "purple": (140, 50, 190),
    "pink": (255, 130, 190),
    "brown": (135, 80, 40),
}

NATURAL_COLOUR: dict[str, str] = {
    "apple": "red",
    "banana": "yellow",
    "boat": "blue",
    "car": "red",
    "cup": "blue",
    "fish": "orange",
    "flower": "pink",
    "hat": "brown",
    "house": "brown",
    "mushroom": "red",
    "tree": "green",
    "umbrella": "purple",
}

OBJECTS: tuple[str, ...] = tuple(NATURAL_COLOUR)
SUPERSAMPLED_PX = 256
OUTLINE: RGB = (35, 30, 35)
WHITE: RGB = (250, 250, 250)
WOOD: RGB = (120, 75, 40)
LEAF: RGB = (50, 140, 60)
GLASS: RGB = (190, 230, 250)
LINE_WIDTH = 4.5


def plural(noun: str) -> str:
    """Return the plural of an object's name."""
    return {"fish": "fish"}.get(noun, noun + ("es" if noun.endswith("sh") else "s"))


class _Pen:
    """Draws outlined shapes in the unit square of 100 x 100."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw
        self.scale = SUPERSAMPLED_PX / 100
        self.width = round(LINE_WIDTH * self.scale)

    def polygon(self, points: Sequence[tuple[float, float]], fill: RGB) -> None:
        """Fill a polygon and draw its outline."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.polygon(scaled, fill=fill)
        self.draw.line([*scaled, scaled[0], scaled[1]], fill=OUTLINE, width=self.width, joint="curve")

    def ellipse(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> None:
        """Fill an ellipse and draw its outline."""
        self.draw.ellipse(self._box(left, top, right, bottom), fill=fill, outline=OUTLINE, width=self.width)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> None:
        """Fill a rectangle and draw its outline."""
        self.draw.rectangle(self._box(left, top, right, bottom), fill=fill, outline=OUTLINE, width=self.width)

    def dome(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> None:
        """Fill the upper half of an ellipse and draw its outline."""
        self.draw.chord(self._box(left, top, right, bottom), 180, 360, fill=fill, outline=OUTLINE, width=self.width)

    def dot(self, x: float, y: float, radius: float, fill: RGB) -> None:
        """Fill a disc without an outline."""
        self.draw.ellipse(self._box(x - radius, y - radius, x + radius, y + radius), fill=fill)

    def line(self, points: Sequence[tuple[float, float]], colour: RGB, width: float) -> None:
        """Draw a polyline of a given width."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * self.scale), joint="curve")

    def arc(self, left: float, top: float, right: float, bottom: float, start: float, end: float, width: float) -> None:
        """Draw a dark arc between two angles in degrees."""
        box = self._box(left, top, right, bottom)
        self.draw.arc(box, start, end, fill=OUTLINE, width=round(width * self.scale))

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * self.scale, top * self.scale, right * self.scale, bottom * self.scale


def _apple(pen: _Pen, body: RGB) -> None:
    pen.line([(50, 34), (53, 8)], WOOD, 8)
    pen.ellipse(10, 24, 62, 92, body)
    pen.ellipse(38, 24, 90, 92, body)
    pen.draw.ellipse(pen._box(28, 32, 72, 88), fill=body)
    pen.polygon([(55, 20), (70, 6), (90, 8), (76, 24)], LEAF)
    pen.dot(28, 46, 6, WHITE)


def _banana(pen: _Pen, body: RGB) -> None:
    outer = [(8, 34), (14, 60), (32, 80), (58, 86), (82, 74), (94, 50), (96, 22)]
    inner = [(84, 20), (78, 40), (64, 54), (44, 54), (26, 44), (18, 30)]
    pen.polygon([*outer, *inner], body)
    pen.polygon([(83, 24), (84, 8), (96, 8), (97, 24)], WOOD)


def _boat(pen: _Pen, body: RGB) -> None:
    pen.line([(50, 66), (50, 4)], WOOD, 7)
    pen.polygon([(56, 8), (56, 56), (92, 56)], WHITE)
    pen.polygon([(44, 20), (44, 56), (14, 56)], WHITE)
    pen.polygon([(3, 64), (97, 64), (80, 94), (20, 94)], body)


def _car(pen: _Pen, body: RGB) -> None:
    pen.polygon([(22, 48), (34, 22), (68, 22), (82, 48)], body)
    pen.polygon([(33, 46), (40, 30), (48, 30), (48, 46)], GLASS)
    pen.polygon([(56, 46), (56, 30), (64, 30), (71, 46)], GLASS)
    pen.rectangle(3, 46, 97, 72, body)
    for centre in (25, 75):
        pen.dot(centre, 73, 15, OUTLINE)
        pen.dot(centre, 73, 6, WHITE)


def _cup(pen: _Pen, body: RGB) -> None:
    pen.draw.ellipse(pen._box(58, 30, 98, 72), outline=OUTLINE, width=pen.width * 3)
    pen.draw.ellipse(pen._box(61.5, 33.5, 94.5, 68.5), outline=body, width=round(pen.width * 1.6))
    pen.polygon([(8, 22), (74, 22), (66, 90), (16, 90)], body)
    pen.ellipse(8, 12, 74, 32, WHITE)


def _fish(pen: _Pen, body: RGB) -> None:
    pen.polygon([(66, 50), (97, 22), (90, 50), (97, 78)], body)
    pen.polygon([(30, 32), (50, 10), (62, 34)], body)
    pen.ellipse(3, 24, 76, 78, body)
    pen.arc(18, 30, 46, 72, -70, 70, 4)
    pen.dot(20, 44, 8, WHITE)
    pen.dot(19, 44, 4, OUTLINE)


def _flower(pen: _Pen, body: RGB) -> None:
    pen.line([(50, 50), (50, 97)], LEAF, 9)
    pen.polygon([(52, 88), (62, 70), (84, 66), (74, 84)], LEAF)
    for x, y in ((50, 18), (75, 32), (67, 58), (33, 58), (25, 32)):
        pen.ellipse(x - 17, y - 17, x + 17, y + 17, body)
    pen.ellipse(36, 24, 64, 52, (255, 240, 120))


def _hat(pen: _Pen, body: RGB) -> None:
    pen.ellipse(2, 62, 98, 90, body)
    pen.polygon([(24, 74), (28, 20), (40, 14), (60, 14), (72, 20), (76, 74)], body)
    pen.polygon([(25, 72), (26, 56), (74, 56), (75, 72)], WHITE)


def _house(pen: _Pen, body: RGB) -> None:
    pen.rectangle(68, 10, 80, 36, body)
    pen.rectangle(16, 44, 84, 95, body)
    pen.polygon([(3, 48), (50, 6), (97, 48)], (90, 90, 100))
    pen.rectangle(26, 62, 46, 95, WHITE)
    pen.rectangle(56, 58, 76, 76, GLASS)


def _mushroom(pen: _Pen, body: RGB) -> None:
    pen.polygon([(38, 50), (62, 50), (68, 94), (32, 94)], (250, 235, 210))
    pen.dome(3, 6, 97, 106, body)
    for x, y, radius in ((28, 38, 8), (52, 22, 8), (74, 42, 8)):
        pen.dot(x, y, radius, WHITE)


def _tree(pen: _Pen, body: RGB) -> None:
    pen.rectangle(42, 76, 58, 97, WOOD)
    for top, half_width in ((46, 44), (24, 36), (3, 28)):
        pen.polygon([(50 - half_width, top + 33), (50, top), (50 + half_width, top + 33)], body)


def _umbrella(pen: _Pen, body: RGB) -> None:
    pen.line([(50, 10), (50, 84)], OUTLINE, 6)
    pen.arc(50, 72, 72, 96, 0, 180, 6)
    pen.dome(3, 10, 97, 96, body)
    for left, right in ((3, 34), (34, 66), (66, 97)):
        pen.draw.pieslice(pen._box(left, 44, right, 64), 180, 360, fill=(0, 0, 0, 0), outline=OUTLINE, width=pen.width)


_DRAWERS: dict[str, Callable[[_Pen, RGB], None]] = {
    "apple": _apple,
    "banana": _banana,
    "boat": _boat,
    "car": _car,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "hat": _hat,
    "house": _house,
    "mushroom": _mushroom,
    "tree": _tree,
    "umbrella": _umbrella,
}


@cache
def render_sprite(noun: str, colour: str, size_px: int) -> Image.Image:
    """Draw one object as a square RGBA picture of `size_px` pixels a side.

    Pictures are cached and shared: paste them, never draw on them.
    """
    picture = Image.new("RGBA", (SUPERSAMPLED_PX, SUPERSAMPLED_PX))
    _DRAWERS[noun](_Pen(ImageDraw.Draw(picture)), COLOURS[colour])
    return picture.resize((size_px, size_px), Image.Resampling.BOX)
