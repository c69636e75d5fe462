"""The figures of an expert's steps, as its curve.json and TensorBoard show them."""

from dataclasses import dataclass, field

__all__ = ["Curve"]


@dataclass
class Curve:
    """Figures of every step so far.

    `preferred` is the share of pairs whose chosen image is preferred, where there are pairs; `score` is the mean score of the images of the
    step's round and `equal_groups` the share of their groups that have one score, where images are drawn in rounds.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    preferred: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    equal_groups: list[float] = field(default_factory=list)

    def latest(self) -> dict[str, float]:
        """Return the last step's figures by name."""
        return {name: values[-1] for name, values in vars(self).items() if values}

    def rows(self) -> list[dict[str, float]]:
        """Return one row per step, counted from 1."""
        columns = {name: values for name, values in vars(self).items() if values}
        steps = zip(*columns.values(), strict=True)
        return [{"step": step, **dict(zip(columns, row, strict=True))} for step, row in enumerate(steps, start=1)]
