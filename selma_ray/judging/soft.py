"""Scores from probabilities, in [0, 1]: VQAScore, Soft-TIFA, soft DSG.

An answer whose probability could not be read is None; it is left out of a mean, and all of them missing gives None.
"""

import math
from collections.abc import Iterable

from selma_ray.judging.dsg import mean_score

__all__ = ["geometric_mean", "gold_chance", "soft_dsg", "soft_tifa_am", "soft_tifa_gm", "vqascore_question"]

_VQASCORE = 'Does this figure show "{}"? Please answer yes or no.'


def vqascore_question(prompt: str) -> str:
    """Return VQAScore's question about a prompt (Lin et al. 2024, section 3); its score is P("Yes") at the first token."""
    return _VQASCORE.format(prompt)


def soft_tifa_am(probabilities: Iterable[float | None]) -> float | None:
    """Return the arithmetic mean of the gold answers' probabilities, the atom-level estimate of GenEval 2."""
    return mean_score(probabilities)


def soft_tifa_gm(probabilities: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the gold answers' probabilities, the prompt-level estimate of GenEval 2."""
    return geometric_mean(probabilities)


def soft_dsg(probabilities: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the gold answers' probabilities over a prompt's yes/no questions, whatever they depend on."""
    return geometric_mean(probabilities)


def gold_chance(gold: str, p_yes: float | None) -> float | None:
    """Return the probability of a gold answer from P(yes) against P(no); None where it is neither."""
    if p_yes is None or gold not in ("yes", "no"):
        return None
    return p_yes if gold == "yes" else 1 - p_yes


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of values in [0, 1] that are there; 0 where one is 0."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    if min(there) <= 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, there)) / len(there))
