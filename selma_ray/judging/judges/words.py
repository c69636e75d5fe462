"""Which tokens begin an answer: the probability of a choice is that of every way to write it as one token."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from selma_ray.judging.judges.interface import YES_OR_NO, Answer
from selma_ray.judging.numerals import surface_forms

__all__ = ["AnswerTokens", "p_yes", "spoken"]


class AnswerTokens:
    """A tokenizer's tokens for yes, no and choices, each found once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._found: dict[str, frozenset[int]] = {}

    def of(self, choice: str) -> frozenset[int]:
        """Return the tokens that are a whole surface form of a choice; none for one that takes several tokens."""
        if choice not in self._found:
            self._found[choice] = frozenset(self._single_tokens(surface_forms(choice)))
        return self._found[choice]

    def of_all(self, choices: Sequence[str]) -> list[int]:
        """Return the tokens of yes and no, or of the choices, in order of their numbers."""
        return sorted(set().union(*map(self.of, choices or YES_OR_NO)))

    def probabilities(
        self, choices: Sequence[str], log_probabilities: Mapping[int, float] | torch.Tensor
    ) -> dict[str, float]:
        """Return P of each choice that is one token, from log P of tokens; yes and no where there are no choices."""
        return {
            choice: math.fsum(math.exp(log_probabilities[token]) for token in sorted(tokens))
            for choice in choices or YES_OR_NO
            if (tokens := self.of(choice))
        }

    def _single_tokens(self, forms: Iterable[str]) -> Iterable[int]:
        unknown = self._tokenizer.unk_token_id
        for form in forms:
            for text in (form, f" {form}"):
                tokens = self._tokenizer.encode(text, add_special_tokens=False)
                if len(tokens) == 1 and tokens[0] != unknown:
                    yield tokens[0]


def p_yes(probabilities: Mapping[str, float]) -> float | None:
    """Return P(yes) against P(no) alone; None where either is not known or both are nil."""
    yes, no = (probabilities.get(word) for word in YES_OR_NO)
    return None if yes is None or no is None or yes + no == 0 else yes / (yes + no)


def spoken(text: str, probabilities: Mapping[str, float]) -> Answer:
    """Return the answer that a judge generated, in lower case; null where it said nothing."""
    words = text.strip().lower()
    if not words:
        return Answer(None, reason="the judge answered nothing")
    return Answer(words, p_yes(probabilities), None, dict(probabilities))
