"""The three scorers of the Davidsonian Scene Graph that are in use, each under its own name.

Each takes the questions of one image and gives a score in {0, 1} for each, or None where its answer could not be read. A question
counts when its answer is exactly "yes" and what it depends on holds; they differ in what that means:

    official    every direct parent's own answer is yes (j-min/DSG, calc_vqa_score); not transitive
    dpg         every parent still counts when its turn comes, in the order of the questions (ELLA, DPG-Bench); so it cascades
    selma       as dpg, but a parent that is not there is skipped (SELMA's release), and all questions weigh the same
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from selma_ray.errors import JudgeError

__all__ = ["SCORERS", "Answered", "QuestionScores", "dpg", "mean_score", "official", "overall_score", "selma"]

QuestionScores = list[float | None]

_ROOT = 0


@dataclass(frozen=True)
class Answered:
    """A question's place in its graph and its answer; None where the answer could not be read."""

    id: int
    answer: str | None
    parents: Sequence[int] = ()


def official(questions: Sequence[Answered]) -> QuestionScores:
    """Zero a question when a direct parent's own answer is not yes; raises JudgeError where a parent is missing."""
    raw = _raw_scores(questions)
    return [
        0.0 if raw[each.id] is not None and any(score == 0.0 for score in _parents(each, raw)) else raw[each.id]
        for each in questions
    ]


def dpg(questions: Sequence[Answered]) -> QuestionScores:
    """Zero a question, in place and in order, when a parent's score is 0 by then; raises JudgeError where a parent is missing."""
    scores = _raw_scores(questions)
    for each in questions:
        if scores[each.id] is not None and any(score == 0.0 for score in _parents(each, scores)):
            scores[each.id] = 0.0
    return [scores[each.id] for each in questions]


def selma(questions: Sequence[Answered]) -> QuestionScores:
    """Score as `dpg`, skipping parents that are missing."""
    present = {each.id for each in questions}
    return dpg(
        [Answered(each.id, each.answer, [parent for parent in each.parents if parent in present]) for each in questions]
    )


SCORERS: Mapping[str, Callable[[Sequence[Answered]], QuestionScores]] = {
    "official": official,
    "dpg": dpg,
    "selma": selma,
}


def mean_score(scores: Iterable[float | None]) -> float | None:
    """Return the mean of the scores that are there, or None."""
    readable = [score for score in scores if score is not None]
    return sum(readable) / len(readable) if readable else None


def overall_score(scorer: str, scores_by_image: Sequence[QuestionScores]) -> float | None:
    """Average over the questions of an image and then over images; `selma` averages over all questions at once."""
    if scorer == "selma":
        return mean_score(score for scores in scores_by_image for score in scores)
    return mean_score(mean_score(scores) for scores in scores_by_image)


def _raw_scores(questions: Sequence[Answered]) -> dict[int, float | None]:
    return {each.id: None if each.answer is None else float(each.answer == "yes") for each in questions}


def _parents(question: Answered, scores: Mapping[int, float | None]) -> list[float | None]:
    try:
        return [scores[parent] for parent in question.parents if parent != _ROOT]
    except KeyError as missing:
        raise JudgeError(
            f"question {question.id} depends on question {missing}, which is not there; fix the question set"
        ) from None
