"""What every judge is: images and their questions in, readable answers or a reason out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

__all__ = ["Answer", "Judge"]


@dataclass(frozen=True)
class Answer:
    """An answer: `text` is "yes", "no" or other words; None, with a `reason`, where the judge could not be read."""

    text: str | None
    p_yes: float | None = None
    reason: str | None = None


class Judge(Protocol):
    """A model that answers questions about images; answers depend neither on the batch nor on its order."""

    name: str
    """The judge and its revision, as result rows name it."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        ...
