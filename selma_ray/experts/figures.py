"""Figures of training, step by step: the loss, also by noise level, the learning rate and, of pairs, the share that is preferred."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["NOISE_LEVELS", "Curve", "by_noise_level"]

NOISE_LEVELS = ("noise_0_25", "noise_25_50", "noise_50_75", "noise_75_100")
"""Quarters of the noise levels, in percent; 100 is noise alone."""


def by_noise_level(errors_N: torch.Tensor, levels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return, for each quarter of the noise levels (0 to 1), the summed error and the number of examples, over all examples.

    Means of these over parts of a batch give the quarter's loss: the first over the second.
    """
    quarters_N = (levels_N * len(NOISE_LEVELS)).long().clamp(0, len(NOISE_LEVELS) - 1)
    figures = {}
    for quarter, name in enumerate(NOISE_LEVELS):
        inside_N = (quarters_N == quarter).to(errors_N.dtype)
        figures[f"sum/{name}"] = (errors_N.detach() * inside_N).mean()
        figures[f"count/{name}"] = inside_N.mean()
    return figures


@dataclass
class Curve:
    """Figures of every step so far; `preferred` is the share of pairs whose chosen image is preferred, where there are pairs.

    `loss_by_noise` has the loss of each quarter of the noise levels of which the step had examples. Where images are drawn in rounds,
    `score` is the mean score of the step's round, and `equal_groups` the share of its groups of images that have one score.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    preferred: list[float] = field(default_factory=list)
    loss_by_noise: list[dict[str, float]] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    equal_groups: list[float] = field(default_factory=list)

    def add(self, figures: Mapping[str, float], learning_rate: float) -> None:
        """Add a step by the means of its figures over the global batch."""
        self.loss.append(figures["loss"])
        self.learning_rate.append(learning_rate)
        if "preferred" in figures:
            self.preferred.append(figures["preferred"])
        if f"count/{NOISE_LEVELS[0]}" in figures:
            there = [name for name in NOISE_LEVELS if figures[f"count/{name}"]]
            losses = {f"loss_{name}": figures[f"sum/{name}"] / figures[f"count/{name}"] for name in there}
            self.loss_by_noise.append(losses)

    def latest(self) -> dict[str, float]:
        """Return the last step's figures by name."""
        return _flat({name: values[-1] for name, values in vars(self).items() if values})

    def rows(self) -> list[dict[str, float]]:
        """Return one row per step, counted from 1."""
        columns = {name: values for name, values in vars(self).items() if values}
        steps = zip(*columns.values(), strict=True)
        return [
            {"step": step, **_flat(dict(zip(columns, row, strict=True)))} for step, row in enumerate(steps, start=1)
        ]


def _flat(figures: Mapping[str, Any]) -> dict[str, float]:
    nested = figures.get("loss_by_noise", {})
    return {name: value for name, value in figures.items() if name != "loss_by_noise"} | nested
