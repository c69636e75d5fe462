"""The miniature's second judge behind the interface of all judges: what is asked about is computed from what a detector finds."""

from collections.abc import Sequence

import torch
from PIL import Image

from selma_ray.judging.judges.interface import YES_OR_NO, Answer, Choices
from selma_ray.judging.numerals import surface_forms
from selma_ray.miniature.detector import Detections, MiniatureDetector
from selma_ray.miniature.question_texts import key_of_question
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.locate import LocatedModel

__all__ = ["MiniatureDetectorJudge"]

_Asked = tuple[Image.Image, Sequence[str], Sequence[Sequence[str]]]


class MiniatureDetectorJudge:
    """Answers "yes", "no" or a number; a question outside the miniature's grammar has no answer, and says so."""

    def __init__(self, located: LocatedModel, batch_size: int, device: torch.device | str) -> None:
        self._detector = MiniatureDetector.from_pretrained(located.path)
        self._detector.model.to(device)
        self._batches = HalvingBatches(batch_size)
        self.name = f"miniature-detector@{located.revision}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        choices = [[()] * len(asked) for asked in questions] if choices is None else choices
        return self._batches.map(self._answered, list(zip(images, questions, choices, strict=True)))

    def _answered(self, batch: Sequence[_Asked]) -> list[list[Answer]]:
        found = self._detector.detect([image for image, _, _ in batch])
        return [
            [_answer(detections, question, offered) for question, offered in zip(questions, choices, strict=True)]
            for detections, (_, questions, choices) in zip(found, batch, strict=True)
        ]


def _answer(found: Detections, question: str, choices: Sequence[str]) -> Answer:
    key = key_of_question(question)
    if key is None:
        return Answer(None, None, f"the detector knows no question {question[:80]!r}")
    if key[0] == "how_many":
        chances = found.counts(key[1])
        by_number = {str(number): float(chance) for number, chance in enumerate(chances)}
        return Answer(str(found.number(key[1])), None, None, _offered(by_number, choices or tuple(by_number)))
    p_yes = found.probability(key)
    return Answer("yes" if p_yes > 0.5 else "no", p_yes, None, _offered({"yes": p_yes, "no": 1 - p_yes}, choices))


def _offered(chances: dict[str, float], choices: Sequence[str]) -> dict[str, float]:
    """Return the probability of each choice that is one of the answers, in digits or in words."""
    return {
        choice: chances[form] for choice in choices or YES_OR_NO for form in surface_forms(choice) if form in chances
    }
