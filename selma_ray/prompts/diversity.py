"""The published rule for diverse prompts, exactly: a candidate too similar to a kept prompt is dropped (SELMA, section 3.1).

Too similar means that the ROUGE-L F-measure exceeds a threshold. ROUGE-L is computed as the `rouge-score` package does
without a stemmer: F = 2PR / (P + R) with P = LCS / n, R = LCS / m, where n and m count the tokens of the two prompts and
LCS is the length of their longest common subsequence. Tokens are rouge-score's for Latin text; it sees no other script, of
which words or characters are tokens here. The LCS is at most the number of tokens the two share, so most kept
prompts are ruled out by counting shared tokens in an inverted index.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq

from selma_ray.words import tokens_of

__all__ = ["DiversityFilter", "Match"]

_UNKNOWN = chr(0x10FFFF)
_UNREACHABLE = np.iinfo(np.int32).max
_COMMON = 1 / 16  # share of the prompts that makes a token common: measured to cost least from 1,000 to 100,000 prompts
_Key = tuple[str, int]  # a token and which of its occurrences: shared keys of two prompts count their shared tokens


@dataclass(frozen=True)
class Match:
    """A kept prompt that a candidate is too similar to, and their ROUGE-L F-measure."""

    prompt: str
    score: float


class DiversityFilter:
    """The kept prompts of one skill, and which candidates are too similar to one of them."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._prompts: list[str] = []
        self._encoded: list[str] = []
        self._lengths = array("i")
        self._postings: dict[_Key, array[int]] = {}
        self._characters: dict[str, str] = {}
        self._required: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, prompt: str) -> None:
        """Keep a prompt."""
        tokens = tokens_of(prompt)
        number = len(self._prompts)
        for key in _keys(tokens):
            self._postings.setdefault(key, array("i")).append(number)
        self._prompts.append(prompt)
        # One character per token, for which the LCS is fastest.
        self._encoded.append(
            "".join(self._characters.setdefault(token, chr(len(self._characters))) for token in tokens)
        )
        self._lengths.append(len(tokens))

    def match(self, candidate: str) -> Match | None:
        """Return the first kept prompt whose ROUGE-L F-measure to the candidate exceeds the threshold, or None."""
        tokens = tokens_of(candidate)
        encoded = "".join(self._characters.get(token, _UNKNOWN) for token in tokens)
        for number in self._possible(tokens):
            score = _f_measure(LCSseq.similarity(encoded, self._encoded[number]), len(tokens), self._lengths[number])
            if score > self.threshold:
                return Match(self._prompts[number], score)
        return None

    def _possible(self, tokens: list[str]) -> np.ndarray:
        """Return which kept prompts share enough tokens with the candidate to exceed the threshold."""
        if not tokens or not self._prompts:
            return np.empty(0, np.int64)
        required = self._required_overlaps(len(tokens))
        least = min(int(required.min()), len(tokens) + 1)
        postings = sorted((self._postings[key] for key in _keys(tokens) if key in self._postings), key=len)
        # Tokens that very many prompts hold say little and cost most: they are not counted but taken to be shared.
        uncounted = 0
        while uncounted < least - 1 and postings and len(postings[-1]) > _COMMON * len(self._prompts):
            postings.pop()
            uncounted += 1
        if not postings:
            return np.empty(0, np.int64)
        found = np.concatenate([np.frombuffer(numbers, np.int32) for numbers in postings])
        overlaps = np.bincount(found, minlength=len(self._prompts))
        possible = np.flatnonzero(overlaps >= least - uncounted)
        lengths = np.frombuffer(self._lengths, np.int32)[possible]
        return possible[overlaps[possible] + uncounted >= required[np.minimum(lengths, len(required) - 1)]]

    def _required_overlaps(self, num_tokens: int) -> np.ndarray:
        """Return, by the length of a kept prompt, the shortest LCS with `num_tokens` that exceeds the threshold."""
        if num_tokens not in self._required:
            # F <= 2m / (n + m) and <= 2n / (n + m): beyond this length no prompt can exceed the threshold.
            longest = math.ceil(num_tokens * (2 / self.threshold - 1)) + 1
            lengths = range(longest + 1)
            self._required[num_tokens] = np.array(
                [self._shortest_lcs(num_tokens, length) for length in lengths], np.int32
            )
        return self._required[num_tokens]

    def _shortest_lcs(self, num_tokens: int, length: int) -> int:
        shortest = max(0, math.floor(self.threshold * (num_tokens + length) / 2) - 1)
        for lcs in range(shortest, min(num_tokens, length) + 1):
            if _f_measure(lcs, num_tokens, length) > self.threshold:
                return lcs
        return _UNREACHABLE


def _keys(tokens: list[str]) -> list[_Key]:
    return [(token, occurrence) for token, count in Counter(tokens).items() for occurrence in range(count)]


def _f_measure(lcs: int, num_tokens: int, num_other_tokens: int) -> float:
    """Return the F-measure with the roundings of rouge-score: the threshold is compared with the very same number."""
    if not num_tokens or not num_other_tokens or not lcs:
        return 0.0
    precision, recall = lcs / num_tokens, lcs / num_other_tokens
    return 2 * precision * recall / (precision + recall)
