"""From the answer rows of a model to the score of each of its images."""

from collections.abc import Iterable, Mapping
from typing import Any

from selma_ray.evaluation.dsg import SCORERS, Answered

__all__ = ["images_scored"]


def images_scored(
    answers: Iterable[Mapping[str, Any]], scorer: str
) -> dict[tuple[str, int], list[tuple[Mapping[str, Any], float | None]]]:
    """Return {(prompt id, seed): [(answer row, its score or None)]} for the answer rows of one model."""
    by_image: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_image.setdefault((answer["prompt_id"], answer["seed"]), []).append(answer)
    score = SCORERS[scorer]
    return {
        image: list(
            zip(
                asked,
                score([Answered(row["question_id"], row["answer"], row["parents"]) for row in asked]),
                strict=True,
            )
        )
        for image, asked in by_image.items()
    }
