"""What every judge is: images and their questions in, readable answers or a reason out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

__all__ = ["YES_OR_NO", "Answer", "Choices", "Judge", "regroup"]

YES_OR_NO = ("yes", "no")

Choices = Sequence[Sequence[Sequence[str]]]
"""The choices of each question of each image; a question without any is a yes/no question."""


@dataclass(frozen=True)
class Answer:
    """An answer: `text` is "yes", "no" or other words; None, with a `reason`, where the judge could not be read."""

    text: str | None
    p_yes: float | None = None
    """P(yes) against P(no) alone, in [0, 1]."""
    reason: str | None = None
    probabilities: Mapping[str, float] | None = None
    """P that the judge's first word is this choice (yes and no where there are none), against all that it could say."""


class Judge(Protocol):
    """A model that answers questions about images; answers depend neither on the batch nor on its order."""

    name: str
    """The judge, its revision and the version of its prompt, as result rows name it."""

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order; `choices` is None where all are yes/no questions."""
        ...


def regroup(answers: Sequence[Answer], questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
    """Return answers to all questions in a row as answers to each image's questions."""
    following = iter(answers)
    return [[next(following) for _ in asked] for asked in questions]
