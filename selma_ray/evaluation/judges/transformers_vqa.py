"""Judges of transformers' visual question answering classes: ViLT (a classifier) and BLIP (a generator)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from selma_ray.errors import JudgeError
from selma_ray.evaluation.judges.interface import Answer
from selma_ray.models.locate import LocatedModel

__all__ = ["TransformersJudge"]

_MAX_ANSWER_TOKENS = 10


class TransformersJudge:
    """Answers in the model's own words, lower case; `p_yes` weighs "yes" against "no" alone."""

    def __init__(self, located: LocatedModel, batch_size: int) -> None:
        try:
            self._processor = AutoProcessor.from_pretrained(located.path)
            model = AutoModelForVisualQuestionAnswering.from_pretrained(located.path, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise JudgeError(
                f"evaluation.judge.name {located.path} cannot be opened ({reason}); "
                "name a visual question answering model of transformers, such as ViLT or BLIP"
            ) from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = model.eval().to(self._device)
        self._batch_size = batch_size
        self.name = f"{located.path}@{located.revision}"

    def answer(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        pairs = [(image, question) for image, asked in zip(images, questions, strict=True) for question in asked]
        answers = self._answers(pairs)
        return [[next(answers) for _ in asked] for asked in questions]

    def _answers(self, pairs: Sequence[tuple[Image.Image, str]]) -> Iterator[Answer]:
        for start in range(0, len(pairs), self._batch_size):
            batch_images, batch_questions = zip(*pairs[start : start + self._batch_size], strict=True)
            inputs = self._processor(
                images=[image.convert("RGB") for image in batch_images],
                text=list(batch_questions),
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
            yield from self._classified(inputs) if self._is_classifier else self._generated(inputs)

    @property
    def _is_classifier(self) -> bool:
        return self._model.config.model_type == "vilt"

    @torch.inference_mode()
    def _classified(self, inputs: Any) -> list[Answer]:
        logits_NL = self._model(**inputs).logits.float()
        labels = {index: label.lower() for index, label in self._model.config.id2label.items()}
        index_of = {label: index for index, label in labels.items()}
        yes, no = index_of.get("yes"), index_of.get("no")
        chances: list[float | None] = [None] * len(logits_NL)
        if yes is not None and no is not None:
            chances = torch.sigmoid(logits_NL[:, yes] - logits_NL[:, no]).tolist()
        return [
            Answer(labels[index], p_yes) for index, p_yes in zip(logits_NL.argmax(dim=1).tolist(), chances, strict=True)
        ]

    @torch.inference_mode()
    def _generated(self, inputs: Any) -> list[Answer]:
        tokens_NT = self._model.generate(**inputs, max_new_tokens=_MAX_ANSWER_TOKENS, do_sample=False)
        texts = self._processor.batch_decode(tokens_NT, skip_special_tokens=True)
        return [
            Answer(text.strip().lower()) if text.strip() else Answer(None, None, "the judge answered nothing")
            for text in texts
        ]
