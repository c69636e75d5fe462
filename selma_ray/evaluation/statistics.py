"""Intervals and paired tests over prompts, seeded and vectorised.

Each prompt p brings a sum s_p of scores and a count n_p of them; the figure is sum(s) / sum(n). With n_p = 1 it is a mean over
prompts, with n_p the number of questions a mean over questions. Shapes: P prompts, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Difference", "Figure", "figure", "paired_difference", "sign_test"]

_LEVEL = 0.95
_CHUNK = 1 << 22  # indices drawn at once


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% bootstrap interval; `count` is what it averages over."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95% bootstrap interval, the prompts won, lost and tied, and the sign test's p."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    p_sign: float


def figure(sums_P: NDArray, counts_P: NDArray, resamples: int, seed: int) -> Figure | None:
    """Return sum(s) / sum(n) with a percentile bootstrap interval over prompts, or None where nothing was counted."""
    present = counts_P > 0
    sums_P, counts_P = sums_P[present], counts_P[present]
    if len(sums_P) == 0:
        return None
    low, high = np.quantile(_resampled(sums_P, counts_P, resamples, seed), _tails())
    return Figure(float(sums_P.sum() / counts_P.sum()), float(low), float(high), int(counts_P.sum()))


def paired_difference(
    sums_P: NDArray, counts_P: NDArray, base_sums_P: NDArray, base_counts_P: NDArray, resamples: int, seed: int
) -> Difference | None:
    """Return figure minus base figure over the prompts that both have, resampled together; None where they share none."""
    present = (counts_P > 0) & (base_counts_P > 0)
    if not present.any():
        return None
    sums_P, counts_P = sums_P[present], counts_P[present]
    base_sums_P, base_counts_P = base_sums_P[present], base_counts_P[present]
    resampled = _resampled(sums_P, counts_P, resamples, seed) - _resampled(base_sums_P, base_counts_P, resamples, seed)
    low, high = np.quantile(resampled, _tails())
    gains_P = sums_P / counts_P - base_sums_P / base_counts_P
    wins, losses = int((gains_P > 0).sum()), int((gains_P < 0).sum())
    return Difference(
        mean=float(sums_P.sum() / counts_P.sum() - base_sums_P.sum() / base_counts_P.sum()),
        low=float(low),
        high=float(high),
        wins=wins,
        losses=losses,
        ties=len(gains_P) - wins - losses,
        p_sign=sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of `wins` against `losses` when both are as likely; ties are left out."""
    trials = wins + losses
    tail = sum(math.comb(trials, successes) for successes in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


def _resampled(sums_P: NDArray, counts_P: NDArray, resamples: int, seed: int) -> NDArray:
    """Return the figure of each resample, shape (R,); the same seed and P draw the same prompts."""
    rng = np.random.default_rng(seed)
    num_prompts = len(sums_P)
    at_once = max(1, _CHUNK // num_prompts)
    figures = []
    for start in range(0, resamples, at_once):
        drawn_RP = rng.integers(num_prompts, size=(min(at_once, resamples - start), num_prompts))
        figures.append(sums_P[drawn_RP].sum(axis=1) / counts_P[drawn_RP].sum(axis=1))
    return np.concatenate(figures)


def _tails() -> tuple[float, float]:
    return (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
