"""Judges of transformers' visual question answering classes: ViLT (a classifier) and BLIP (a generator).

Shapes: N pairs of image and question, T tokens, P patches, D features, L labels, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from selma_ray.errors import JudgeError, first_line
from selma_ray.judging.judges.interface import YES_OR_NO, Answer, Choices, regroup
from selma_ray.judging.judges.words import AnswerTokens, spoken
from selma_ray.judging.numerals import surface_forms
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.locate import LocatedModel

__all__ = ["MODEL_TYPES", "TransformersJudge"]

MODEL_TYPES = ("vilt", "blip")

_MAX_ANSWER_TOKENS = 10


class _Asked(NamedTuple):
    seen: Any
    """What the model sees: an image for ViLT, an image's states [P, D] for BLIP."""
    question: str
    choices: Sequence[str]


class TransformersJudge:
    """Answers in the model's own words, lower case; `p_yes` weighs "yes" against "no" alone."""

    def __init__(self, located: LocatedModel, batch_size: int, device: torch.device | str) -> None:
        try:
            revision = {} if Path(located.path).is_dir() else {"revision": located.revision}
            self._processor: Any = AutoProcessor.from_pretrained(located.path, **revision)
            model = AutoModelForVisualQuestionAnswering.from_pretrained(located.path, use_safetensors=True, **revision)
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(
                f"evaluation.judge.name {located.path} cannot be opened ({first_line(error)}); "
                "name a visual question answering model of transformers, such as ViLT or BLIP"
            ) from None
        if model.config.model_type not in MODEL_TYPES:
            raise JudgeError(
                f"evaluation.judge.name {located.path} must be {' or '.join(MODEL_TYPES)} for transformers, got "
                f"{model.config.model_type}; set evaluation.judge.engine to vllm"
            )
        self._device = device
        self._model: Any = model.eval().to(self._device)
        self._batches = HalvingBatches(batch_size)
        self._tokens = AnswerTokens(self._processor.tokenizer)
        self.name = f"{located.path}@{located.revision}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        choices = [[()] * len(asked) for asked in questions] if choices is None else choices
        classifies = self._model.config.model_type == "vilt"
        asked = [
            _Asked(seen, question, offered)
            for seen, of_image, offered_of_image in zip(
                images if classifies else self._batches.map(self._encoded, images), questions, choices, strict=True
            )
            for question, offered in zip(of_image, offered_of_image, strict=True)
        ]
        answers = self._batches.map(self._classified, asked) if classifies else self._generated_by_length(asked)
        return regroup(answers, questions)

    def _generated_by_length(self, asked: Sequence[_Asked]) -> list[Answer]:
        # transformers lets BLIP's decoder read the padding of questions, so that answers would depend on the batch: only
        # questions of one length share a batch.
        lengths = [len(tokens) for tokens in self._processor.tokenizer([each.question for each in asked])["input_ids"]]
        order = sorted(range(len(asked)), key=lengths.__getitem__)
        answers: dict[int, Answer] = {}
        for _, same_length in groupby(order, key=lengths.__getitem__):
            rows = list(same_length)
            answers.update(zip(rows, self._batches.map(self._generated, [asked[row] for row in rows]), strict=True))
        return [answers[row] for row in range(len(asked))]

    @torch.inference_mode()
    def _classified(self, asked: Sequence[_Asked]) -> list[Answer]:
        """ViLT is fitted with a logistic loss a label: each label has a probability of its own."""
        inputs = self._processor(
            images=[each.seen.convert("RGB") for each in asked], text=[each.question for each in asked], padding=True,
            truncation=True, return_tensors="pt",
        ).to(self._device)  # fmt: skip
        logits_NL = self._model(**inputs).logits.float()
        labels = {index: label.lower() for index, label in self._model.config.id2label.items()}
        index_of = {label: index for index, label in labels.items()}
        answers = []
        for each, logits_L in zip(asked, logits_NL.cpu(), strict=True):
            known = {
                choice: index_of[form]
                for choice in each.choices or YES_OR_NO
                for form in surface_forms(choice)
                if form in index_of
            }
            probabilities = {choice: float(logits_L[index].sigmoid()) for choice, index in known.items()}
            yes, no = (index_of.get(word) for word in YES_OR_NO)
            chance = None if yes is None or no is None else float(torch.sigmoid(logits_L[yes] - logits_L[no]))
            answers.append(Answer(labels[int(logits_L.argmax())], chance, None, probabilities))
        return answers

    @torch.inference_mode()
    def _encoded(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Return the states [P, D] of each image, which all its questions read."""
        pixels = self._processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
        return list(self._model.vision_model(pixel_values=pixels["pixel_values"].to(self._device)).last_hidden_state)

    @torch.inference_mode()
    def _generated(self, asked: Sequence[_Asked]) -> list[Answer]:
        """BLIP's generate from images that are encoded already, for questions of one length."""
        patches_NPD = torch.stack([each.seen for each in asked])
        questions = self._processor.tokenizer(
            [each.question for each in asked], truncation=True, return_tensors="pt", return_token_type_ids=False
        ).to(self._device)
        question_NTD = self._model.text_encoder(
            **questions, encoder_hidden_states=patches_NPD, encoder_attention_mask=_all_ones(patches_NPD)
        ).last_hidden_state
        text_config = self._model.config.text_config
        generated = self._model.text_decoder.generate(
            input_ids=torch.full((len(asked), 1), self._model.decoder_start_token_id, device=self._device),
            encoder_hidden_states=question_NTD, encoder_attention_mask=_all_ones(question_NTD),
            eos_token_id=text_config.sep_token_id, pad_token_id=text_config.pad_token_id, do_sample=False,
            max_new_tokens=_MAX_ANSWER_TOKENS, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        texts = self._processor.batch_decode(generated.sequences, skip_special_tokens=True)
        log_chances_NV = generated.logits[0].float().log_softmax(-1).cpu()
        return [
            spoken(text, self._tokens.probabilities(each.choices, log_chances_V))
            for each, text, log_chances_V in zip(asked, texts, log_chances_NV, strict=True)
        ]


def _all_ones(states_NSD: torch.Tensor) -> torch.Tensor:
    return torch.ones(states_NSD.shape[:2], dtype=torch.long, device=states_NSD.device)
