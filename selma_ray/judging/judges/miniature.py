"""The miniature's judge behind the interface of all judges: an image is encoded once and asked all its questions.

A question is encoded once too, whichever images it is asked about. Shapes: N images, Q questions an image, U different questions,
S slots of an image, D features, A answers.
"""

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image

from selma_ray.judging.judges.interface import YES_OR_NO, Answer, Choices
from selma_ray.judging.numerals import surface_forms
from selma_ray.miniature.judge import ANSWERS, MiniatureJudge, tokenize_questions
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.locate import LocatedModel

__all__ = ["MiniatureImageJudge"]

_NO, _YES = ANSWERS.index("no"), ANSWERS.index("yes")
_MOST_ENCODED = 20_000
_Asked = tuple[Image.Image, Sequence[str], Sequence[Sequence[str]]]


class MiniatureImageJudge:
    """Answers "yes", "no" or a number; `p_yes` weighs yes against no alone."""

    def __init__(self, located: LocatedModel, batch_size: int, device: torch.device | str) -> None:
        self._judge = MiniatureJudge.from_pretrained(located.path)
        self._judge.model.to(device)
        self._batches = HalvingBatches(batch_size)
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.name = f"miniature@{located.revision}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        choices = [[()] * len(asked) for asked in questions] if choices is None else choices
        return self._batches.map(self._answered, list(zip(images, questions, choices, strict=True)))

    def _answered(self, batch: Sequence[_Asked]) -> list[list[Answer]]:
        images, questions, choices = zip(*batch, strict=True)
        chances = self._chances(self._judge.encode_images(images), questions)
        return [_readable(chances_QA, offered) for chances_QA, offered in zip(chances, choices, strict=True)]

    @torch.inference_mode()
    def _chances(self, image_states_NSD: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Return, for each image, probabilities [Q, A] of the judge's answers to each of its questions."""
        different = list(dict.fromkeys(question for asked in questions for question in asked))
        if not different:
            return [torch.zeros(0, len(ANSWERS)) for _ in questions]
        question_UD, pointers_U2S = self._encode(different)
        place = {question: number for number, question in enumerate(different)}
        places_NQ = torch.zeros(len(questions), max(map(len, questions)), dtype=torch.long)
        for row, asked in enumerate(questions):
            places_NQ[row, : len(asked)] = torch.tensor([place[question] for question in asked], dtype=torch.long)
        model = self._judge.model
        logits_NQA = model.answer_encoded(image_states_NSD, question_UD[places_NQ], pointers_U2S[places_NQ]).float()
        chances_NQA = (logits_NQA / model.config.temperature).softmax(-1).cpu()
        return [chances_NQA[row, : len(asked)] for row, asked in enumerate(questions)]

    def _encode(self, different: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encodings [U, D] and [U, 2, S] of questions; those of earlier calls are kept."""
        if len(self._encoded) > _MOST_ENCODED:
            self._encoded.clear()
        new = [question for question in different if question not in self._encoded]
        if new:
            tokens_UT = tokenize_questions(self._judge.tokenizer, new).to(self._judge.model.device)
            self._encoded.update(
                zip(new, zip(*self._judge.model.encode_questions(tokens_UT), strict=True), strict=True)
            )
        questions, pointers = zip(*(self._encoded[question] for question in different), strict=True)
        return torch.stack(questions), torch.stack(pointers)


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
