"""T2I-CompBench's rules (Huang et al. 2023, section 4) on given detections and answers: 2D space, numeracy, attributes.

Boxes are (x0, y0, x1, y1) in pixels, y downwards.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selma_ray.errors import JudgeError

__all__ = ["Found", "attribute_binding", "numeracy", "position_score", "spatial_2d"]

_NEAR = ("next to", "on side of", "near")
_NEAR_PX = 150
_MAX_IOU = 0.1
_LEAST_SCORE = 0.5
# Axis (0 is x) and the sign that the second centre minus the first must have.
_DIRECTIONS = {
    "on the right of": (0, -1),
    "on the left of": (0, 1),
    "on the bottom of": (1, -1),
    "on the top of": (1, 1),
}


@dataclass(frozen=True)
class Found:
    """The first detection of a class."""

    box: tuple[float, float, float, float]
    confidence: float


def position_score(locality: str | None, first: Sequence[float], second: Sequence[float]) -> float:
    """Return in [0, 1] how well the first box stands `locality` of the second (determine_position).

    Words of nearness are graded by distance, directions by overlap; any other words score 0, "on top of" among them. Raises
    JudgeError for two boxes without area.
    """
    distance = [(second[axis] + second[axis + 2]) / 2 - (first[axis] + first[axis + 2]) / 2 for axis in (0, 1)]
    overlap = _iou(first, second)
    if locality in _NEAR:
        if min(abs(distance[0]), abs(distance[1])) < _NEAR_PX:
            return 1.0
        return _NEAR_PX / max(abs(distance[0]), abs(distance[1]))
    if locality not in _DIRECTIONS:
        return 0.0
    axis, sign = _DIRECTIONS[locality]
    if distance[axis] * sign <= 0 or abs(distance[axis]) <= abs(distance[1 - axis]):
        return 0.0
    return 1.0 if overlap < _MAX_IOU else _MAX_IOU / overlap


def spatial_2d(locality: str | None, first: Found | None, second: Found | None) -> float:
    """Return 0.25 (c1 + c2) + position / 2 for two objects, of which either may not be found; 0 where that is under 0.5."""
    score = sum(0.25 * each.confidence for each in (first, second) if each)
    if first and second:
        score += position_score(locality, first.box, second.box) / 2
    return score if score >= _LEAST_SCORE else 0.0


def numeracy(expected: Mapping[str, int], counted: Mapping[str, int]) -> float:
    """Return the mean over expected objects of 0.5 for one that is there and 0.5 more where its count is right."""
    if not expected:
        raise JudgeError(
            "T2I-CompBench numeracy needs at least one expected object, got none; fix the prompt's objects"
        )
    earned = [
        0.5 * (counted.get(name, 0) > 0) + 0.5 * (counted.get(name, 0) == count) for name, count in expected.items()
    ]
    return sum(earned) / len(expected)


def attribute_binding(p_yes: Iterable[float | None]) -> float | None:
    """Return the product of P(yes) to "a red cup?" and the like, a question a noun phrase: the score of colour, shape and texture.

    None where one of them could not be read.
    """
    chances = list(p_yes)
    if not chances:
        raise JudgeError("T2I-CompBench attributes need at least one noun phrase, got none; fix the prompt's phrases")
    return None if None in chances else math.prod(chance for chance in chances if chance is not None)


def _iou(first: Sequence[float], second: Sequence[float]) -> float:
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    union = _area(first) + _area(second) - width * height
    if union <= 0:
        raise JudgeError(f"boxes must have an area, got {tuple(first)} and {tuple(second)}; fix the detections")
    return width * height / union


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
