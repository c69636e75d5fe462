"""UnifiedQA, the model that answers TIFA's questions from the caption alone so that bad questions can be dropped."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from selma_ray.errors import JudgeError, first_line
from selma_ray.models.locate import locate_judge

__all__ = ["Seq2SeqAnswerer"]

_PUBLIC = "allenai/unifiedqa-v2-t5-large-1363200"
_MAX_TOKENS = 30
_HEADINGS = ("(A)", "(B)", "(C)", "(D)")


class Seq2SeqAnswerer:
    """A text-to-text model asked in UnifiedQA's words (tifascore/unifiedqa.py); it sees four choices at most."""

    def __init__(self, name: str = _PUBLIC) -> None:
        located = locate_judge(name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(located.path)
            self._model: Any = AutoModelForSeq2SeqLM.from_pretrained(located.path, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(
                f"question answering model {name} cannot be opened ({first_line(error)}); name a folder or hub name of a text-to-text "
                f"model with safetensors weights, such as {_PUBLIC}"
            ) from None

    def choose(self, question: str, caption: str, choices: Sequence[str]) -> str:
        """Answer with one of the choices, or whatever the model says in their place."""
        listed = "".join(f"{heading} {choice} " for heading, choice in zip(_HEADINGS, choices, strict=False))
        return self._generated(f"{question} \n {caption} \n {listed}")

    def answer(self, question: str, caption: str) -> str:
        """Answer in free words, lower case, letters, digits and white space only."""
        answer = self._generated(f"{question} \n {caption}")
        return "".join(letter for letter in answer if letter.isalnum() or letter.isspace()).strip().lower()

    @torch.inference_mode()
    def _generated(self, text: str) -> str:
        tokens = self._tokenizer(text, return_tensors="pt")["input_ids"]
        generated = self._model.generate(tokens, max_new_tokens=_MAX_TOKENS, do_sample=False)
        return self._tokenizer.decode(generated[0], skip_special_tokens=True)
