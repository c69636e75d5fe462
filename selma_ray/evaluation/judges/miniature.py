"""The miniature's judge behind the interface of all judges: an image is encoded once and asked all its questions."""

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image

from selma_ray.evaluation.batching import HalvingBatches
from selma_ray.evaluation.judges.interface import YES_OR_NO, Answer, Choices
from selma_ray.evaluation.numerals import surface_forms
from selma_ray.miniature.judge import ANSWERS, MiniatureJudge
from selma_ray.models.locate import LocatedModel

__all__ = ["MiniatureImageJudge"]

_NO, _YES = ANSWERS.index("no"), ANSWERS.index("yes")
_Asked = tuple[Image.Image, Sequence[str], Sequence[Sequence[str]]]


class MiniatureImageJudge:
    """Answers "yes", "no" or a number; `p_yes` weighs yes against no alone."""

    def __init__(self, located: LocatedModel, batch_size: int) -> None:
        self._judge = MiniatureJudge.from_pretrained(located.path)
        self._batches = HalvingBatches(batch_size)
        self.name = f"miniature@{located.revision}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        choices = [[()] * len(asked) for asked in questions] if choices is None else choices
        return self._batches.map(self._answered, list(zip(images, questions, choices, strict=True)))

    def _answered(self, batch: Sequence[_Asked]) -> list[list[Answer]]:
        images, questions, choices = zip(*batch, strict=True)
        chances = self._judge.answer(self._judge.encode_images(images), questions)
        return [_readable(chances_QA, offered) for chances_QA, offered in zip(chances, choices, strict=True)]


def _readable(chances_QA: torch.Tensor, choices: Sequence[Sequence[str]]) -> list[Answer]:
    p_yes_Q = (chances_QA[:, _YES] / (chances_QA[:, _NO] + chances_QA[:, _YES])).tolist()
    best_Q = chances_QA.argmax(dim=1).tolist()
    return [
        Answer(ANSWERS[best], p_yes, None, {choice: chances_A[column] for choice, column in _columns(tuple(offered))})
        for best, chances_A, p_yes, offered in zip(best_Q, chances_QA.tolist(), p_yes_Q, choices, strict=True)
    ]


@cache
def _columns(choices: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Return the column of each choice that is one of the judge's answers."""
    return tuple(
        (choice, ANSWERS.index(form))
        for choice in choices or YES_OR_NO
        for form in surface_forms(choice)
        if form in ANSWERS
    )
