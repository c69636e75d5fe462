"""Choosing among a prompt's images by a judge's scores: an option that SELMA compares with and does not use (section 5)."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from selma_ray.images.config import ImageChoiceConfig

__all__ = ["OpenScorer", "ScoreImages", "choose", "reject_unchosen"]

ScoreImages = Callable[[Sequence[Image.Image], Sequence[str]], list[float | None]]
"""Scores in [0, 1] of how well images follow their prompts; None for one that could not be judged."""

OpenScorer = Callable[[], ScoreImages]
"""Loads a scorer; called in the renderer's process."""


def choose(
    rows: Sequence[dict[str, Any]],
    images: Sequence[Image.Image | None],
    score: ScoreImages,
    config: ImageChoiceConfig,
) -> None:
    """Score images and set the split of those rows to `rejected` that are not chosen; None stands for an image that failed.

    The rows of a prompt must stand side by side, all of them.
    """
    there = [(row, image) for row, image in zip(rows, images, strict=True) if image is not None]
    scores = score([image for _, image in there], [row["prompt"] for row, _ in there])
    for (row, _), value in zip(there, scores, strict=True):
        row["score"] = value
    for _, of_prompt in groupby(rows, key=lambda row: (row["skill"], row["prompt"])):
        reject_unchosen(list(of_prompt), config)


def reject_unchosen(rows: Sequence[dict[str, Any]], config: ImageChoiceConfig) -> None:
    """Set the split of those rows of one prompt to `rejected` that are not among its best, or below the least score.

    Among equals the first wins; an image that could not be judged counts as 0. Where no image of the prompt was rendered,
    its rows stay as they are: failed, to be tried again.
    """
    rendered = [row for row in rows if row["error"] is None]
    if not rendered:
        return
    best = sorted(rendered, key=lambda row: -(row["score"] or 0.0))[: config.keep_best]
    chosen = {row["id"] for row in best if (row["score"] or 0.0) >= config.min_score}
    for row in rows:
        if row["id"] not in chosen:
            row["split"] = "rejected"
