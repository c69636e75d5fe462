"""Images judged and scored: the one path for offline evaluation and for the service, so that both give the same figures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from selma_ray.evaluation.dsg import SCORERS, Answered, mean_score
from selma_ray.evaluation.judges.interface import Answer, Judge
from selma_ray.evaluation.questions import Question, questions_for_prompt

__all__ = ["ImageScore", "ImageScorer", "ScoredQuestion", "score_images"]

logger = logging.getLogger(__name__)

_REASON_CHARS = 200


@dataclass(frozen=True)
class ScoredQuestion:
    """A question about an image and how it was answered; `answer` is None, with a `reason`, where it could not be read."""

    id: int
    question: str
    category: str
    parents: tuple[int, ...]
    answer: str | None
    p_yes: float | None
    reason: str | None
    counted: bool | None
    """Whether it counts: a yes, with a yes to what it depends on; None where the answer could not be read."""


@dataclass(frozen=True)
class ImageScore:
    """How well an image follows its prompt, in [0, 1]; None where no answer could be read."""

    score: float | None
    judge: str
    questions: tuple[ScoredQuestion, ...]


class ImageScorer:
    """A judge with a DSG scorer, for whoever holds a prompt and an image."""

    def __init__(self, judge: Judge, scorer: str = "official") -> None:
        self._judge = judge
        self._scorer = scorer

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about a prompt; raises CaptionError for a prompt that has none."""
        return questions_for_prompt(prompt)

    def score(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]]) -> list[ImageScore]:
        """Judge each image by its own questions."""
        return score_images(self._judge, images, questions, self._scorer)


def score_images(
    judge: Judge,
    images: Sequence[Image.Image | None],
    questions: Sequence[Sequence[Question]],
    scorer: str = "official",
) -> list[ImageScore]:
    """Ask each image its questions and score the answers; an image that is None or unreadable is null and spares the others."""
    answers = _answers(judge, images, [[each.question for each in asked] for asked in questions])
    return [_score(judge.name, asked, answered, scorer) for asked, answered in zip(questions, answers, strict=True)]


def _answers(
    judge: Judge, images: Sequence[Image.Image | None], questions: Sequence[Sequence[str]]
) -> list[list[Answer]]:
    present = [index for index, image in enumerate(images) if image is not None]
    given = _answers_halving(judge, [images[index] for index in present], [questions[index] for index in present])
    by_index = dict(zip(present, given, strict=True))
    return [
        by_index[index] if index in by_index else [Answer(None, None, "there is no image")] * len(asked)
        for index, asked in enumerate(questions)
    ]


def _answers_halving(judge: Judge, images: Sequence, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
    """Answer a batch; one that fails (out of memory, a corrupt image) is halved until only the faulty image is null."""
    if not images:
        return []
    try:
        return judge.answer(images, questions)
    except Exception as error:
        if len(images) == 1:
            logger.warning("the judge failed on an image: %s", error)
            reason = f"{type(error).__name__}: {error}"[:_REASON_CHARS]
            return [[Answer(None, None, reason)] * len(questions[0])]
    half = len(images) // 2
    return _answers_halving(judge, images[:half], questions[:half]) + _answers_halving(
        judge, images[half:], questions[half:]
    )


def _score(judge: str, questions: Sequence[Question], answers: Sequence[Answer], scorer: str) -> ImageScore:
    asked = [Answered(each.id, answer.text, each.parents) for each, answer in zip(questions, answers, strict=True)]
    scores = SCORERS[scorer](asked)
    scored = tuple(
        ScoredQuestion(
            each.id, each.question, each.category, each.parents, answer.text, answer.p_yes, answer.reason,
            None if score is None else score == 1.0,
        )
        for each, answer, score in zip(questions, answers, scores, strict=True)
    )  # fmt: skip
    return ImageScore(mean_score(scores), judge, scored)
