"""From the answer rows of a model to the score of each of its images."""

from collections.abc import Iterable, Mapping
from typing import Any

from selma_ray.judging.dsg import SCORERS, Answered, QuestionScores

__all__ = ["images_scored", "question_scores"]


def images_scored(
    answers: Iterable[Mapping[str, Any]], scorer: str
) -> dict[tuple[str, int], list[tuple[Mapping[str, Any], float | None]]]:
    """Return {(prompt id, seed): [(answer row, its score or None)]} for the answer rows of one model."""
    by_image: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_image.setdefault((answer["prompt_id"], answer["seed"]), []).append(answer)
    return {image: list(zip(rows, question_scores(rows, scorer), strict=True)) for image, rows in by_image.items()}


def question_scores(answers: Iterable[Mapping[str, Any]], scorer: str) -> QuestionScores:
    """Score the answer rows of one image; a question counts by its gold answer."""
    return SCORERS[scorer]([Answered(row["question_id"], _as_yes_or_no(row), row["parents"]) for row in answers])


def _as_yes_or_no(row: Mapping[str, Any]) -> str | None:
    if row.get("gold") is None or row["answer"] is None:
        return row["answer"]
    return "yes" if row["answer"] == row["gold"] else "no"
