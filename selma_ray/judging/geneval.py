"""GenEval's rules (Ghosh et al. 2023, section 3) on given detections: objects, counts, colours, positions.

Boxes are (x0, y0, x1, y1) in pixels, y downwards. Detections of a class are in order of confidence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selma_ray.errors import JudgeError

__all__ = [
    "COLOURS",
    "TASKS",
    "Detection",
    "Verdict",
    "iou",
    "judge",
    "keep_detections",
    "overall",
    "relative_position",
]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

_CONFIDENCE, _CONFIDENCE_COUNTING = 0.3, 0.9
_MOST_OF_A_CLASS = 16
_POSITION_THRESHOLD = 0.1


@dataclass(frozen=True)
class Detection:
    """A detected object; `colour` is what a zero-shot classifier says of its masked crop, of `COLOURS`."""

    box: tuple[float, float, float, float]
    confidence: float
    colour: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, and each rule that it breaks."""

    correct: bool
    reasons: tuple[str, ...]


def keep_detections(detections: Sequence[Detection], task: str, max_overlap: float = 1.0) -> list[Detection]:
    """Return a class's detections that count: above 0.3 (0.9 for counting), at most 16, in order of confidence.

    Of two that overlap by an IoU of `max_overlap` or more the less confident is dropped; 1 drops none, as the release does.
    """
    threshold = _CONFIDENCE_COUNTING if task == "counting" else _CONFIDENCE
    confident = sorted(
        (each for each in detections if each.confidence > threshold), key=lambda each: each.confidence, reverse=True
    )
    kept: list[Detection] = []
    for each in confident[:_MOST_OF_A_CLASS]:
        if max_overlap == 1 or all(iou(each.box, other.box) < max_overlap for other in kept):
            kept.append(each)
    return kept


def judge(metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Detection]]) -> Verdict:
    """Judge an image by a line of GenEval's evaluation_metadata.jsonl.

    Every clause of `include` must hold and none of `exclude` may; colour and position are asked of the most confident objects of
    a class alone. Raises JudgeError for a position relative to a clause that does not come before.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = list(detections.get(name, ()))[:count]
        broken = list(_broken(clause, found, matched))
        reasons += broken
        matched.append(None if broken else found)
    for clause in metadata.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        seen = len(detections.get(name, ()))
        if seen >= count:
            reasons.append(f"expected {name}<{count}, found {seen}")
    return Verdict(not reasons, tuple(reasons))


def _broken(
    clause: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]
) -> Iterable[str]:
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        yield f"expected {name}>={count}, found {len(found)}"
        return
    if "color" in clause:
        right = sum(each.colour == clause["color"] for each in found)
        if right < count:
            yield f"expected {clause['color']} {name}>={count}, found {right}"
            return
    if "position" in clause:
        relation, target = clause["position"]
        if target >= len(matched):
            raise JudgeError(
                f"GenEval clause {name!r} must be placed by an earlier clause, got {target}; fix the metadata"
            )
        targets = matched[target]
        if targets is None:
            yield f"no target for {name} to be {relation}"
        elif not all(relation in relative_position(each.box, other.box) for each in found for other in targets):
            yield f"expected {name} {relation} target"


def relative_position(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return where `box` lies relative to `other`: left of, right of, above, below.

    The offset of the centres, less 0.1 x the sum of the sizes, must exceed half of the whole offset's length in a direction.
    """
    corners, other_corners = np.reshape(box, (2, 2)), np.reshape(other, (2, 2))
    offset = corners.mean(axis=0) - other_corners.mean(axis=0)
    sizes = np.abs(np.diff(corners, axis=0))[0] + np.abs(np.diff(other_corners, axis=0))[0]
    revised = np.maximum(np.abs(offset) - _POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Return intersection over union of boxes whose last pixels count."""
    shared = _area((max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])))
    union = _area(box) + _area(other) - shared
    return shared / union if union else 0.0


def overall(correct: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Return the accuracy of each task and, under "overall", the mean of those accuracies."""
    by_task: dict[str, list[bool]] = {}
    for task, each in correct:
        by_task.setdefault(task, []).append(each)
    accuracies = {task: sum(values) / len(values) for task, values in by_task.items()}
    return accuracies | ({"overall": sum(accuracies.values()) / len(accuracies)} if accuracies else {})


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
