"""The miniature's judge behind the interface of all judges: an image is encoded once and asked all its questions."""

from collections.abc import Sequence

import torch
from PIL import Image

from selma_ray.evaluation.judges.interface import Answer
from selma_ray.miniature.judge import ANSWERS, MiniatureJudge
from selma_ray.models.locate import LocatedModel

__all__ = ["MiniatureImageJudge"]

_NO, _YES = ANSWERS.index("no"), ANSWERS.index("yes")


class MiniatureImageJudge:
    """Answers "yes", "no" or a number; `p_yes` weighs yes against no alone."""

    def __init__(self, located: LocatedModel, batch_size: int) -> None:
        self._judge = MiniatureJudge.from_pretrained(located.path)
        self._batch_size = batch_size
        self.name = f"miniature@{located.revision}"

    def answer(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        answers = []
        for start in range(0, len(images), self._batch_size):
            batch = slice(start, start + self._batch_size)
            image_states_NSD = self._judge.encode_images(images[batch])
            answers += [_readable(chances_QA) for chances_QA in self._judge.answer(image_states_NSD, questions[batch])]
        return answers


def _readable(chances_QA: torch.Tensor) -> list[Answer]:
    p_yes_Q = chances_QA[:, _YES] / (chances_QA[:, _NO] + chances_QA[:, _YES])
    best_Q = chances_QA.argmax(dim=1)
    return [Answer(ANSWERS[best], p_yes) for best, p_yes in zip(best_Q.tolist(), p_yes_Q.tolist(), strict=True)]
