"""Intervals and paired tests over prompts, seeded and vectorised.

Each prompt p brings a sum s_p of scores and a count n_p of them; the figure is sum(s) / sum(n). With n_p = 1 it is a mean over
prompts, with n_p the number of questions a mean over questions. The images of a prompt are resampled together, as they are not
independent. Shapes: P prompts, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

__all__ = [
    "Difference",
    "Figure",
    "Share",
    "figure",
    "holm",
    "paired_difference",
    "resampled_figures",
    "share",
    "sign_test",
    "tails",
]

Floats = NDArray[np.float64]

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
    """A paired difference with its 95% bootstrap interval, the prompts won, lost and tied, and both tests' two-sided p."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    p_sign: float
    p_bootstrap: float


@dataclass(frozen=True)
class Share:
    """A share of trials with its exact 95% binomial interval (Clopper and Pearson 1934)."""

    mean: float
    low: float
    high: float
    count: int


def figure(sums_P: Floats, counts_P: Floats, resamples: int, seed: int) -> Figure | None:
    """Return sum(s) / sum(n) with a percentile bootstrap interval over prompts, or None where nothing was counted."""
    present = counts_P > 0
    sums_P, counts_P = sums_P[present], counts_P[present]
    if len(sums_P) == 0:
        return None
    low, high = np.quantile(resampled_figures(sums_P, counts_P, resamples, seed), tails())
    return Figure(float(sums_P.sum() / counts_P.sum()), float(low), float(high), int(counts_P.sum()))


def paired_difference(
    sums_P: Floats,
    counts_P: Floats,
    base_sums_P: Floats,
    base_counts_P: Floats,
    resamples: int,
    seed: int,
) -> Difference | None:
    """Return figure minus base figure over the prompts that both have, resampled together; None where they share none."""
    present = (counts_P > 0) & (base_counts_P > 0)
    if not present.any():
        return None
    sums_P, counts_P = sums_P[present], counts_P[present]
    base_sums_P, base_counts_P = base_sums_P[present], base_counts_P[present]
    resampled_R = resampled_figures(sums_P, counts_P, resamples, seed)
    resampled_R = resampled_R - resampled_figures(base_sums_P, base_counts_P, resamples, seed)
    low, high = np.quantile(resampled_R, tails())
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
        p_bootstrap=_bootstrap_test(resampled_R),
    )


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p of `wins` against `losses` when both are as likely; ties are left out."""
    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for testing all of them (Holm 1979): below a level, the family's error rate is below it too."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def share(successes: int, trials: int) -> Share | None:
    """Return successes / trials with its exact binomial interval, or None without trials."""
    if trials == 0:
        return None
    bounds = binomtest(successes, trials).proportion_ci(_LEVEL, method="exact")
    return Share(successes / trials, float(bounds.low), float(bounds.high), trials)


def resampled_figures(sums_P: Floats, counts_P: Floats, resamples: int, seed: int) -> Floats:
    """Return the figure of each resample, shape (R,); the same seed and P draw the same prompts."""
    rng = np.random.default_rng(seed)
    num_prompts = len(sums_P)
    at_once = max(1, _CHUNK // num_prompts)
    figures = []
    for start in range(0, resamples, at_once):
        drawn_RP = rng.integers(num_prompts, size=(min(at_once, resamples - start), num_prompts))
        figures.append(sums_P[drawn_RP].sum(axis=1) / counts_P[drawn_RP].sum(axis=1))
    return np.concatenate(figures)


def tails() -> tuple[float, float]:
    """Return the two quantiles that hold 95% between them."""
    return (1 - _LEVEL) / 2, (1 + _LEVEL) / 2


def _bootstrap_test(resampled_R: Floats) -> float:
    """Return twice the smaller share of resamples on either side of zero, never 0 (Davison and Hinkley 1997, section 4.2)."""
    below, above = ((1 + (side * resampled_R <= 0).sum()) / (1 + len(resampled_R)) for side in (1, -1))
    return float(min(1.0, 2 * min(below, above)))
