"""Geometry of the report's plots, in the units of an SVG's view box; the template draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Axis", "Bin", "CurvePlot", "Interval", "axis_around", "curve", "dev_curve", "intervals", "reliability"]

_POINTS = 120


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`, `width` units wide, with round ticks."""

    low: float
    high: float
    width: float
    ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        """Return the place of a value."""
        return round((value - self.low) / (self.high - self.low) * self.width, 2)


@dataclass(frozen=True)
class Interval:
    """A named figure with its interval, placed on an axis."""

    name: str
    mean: float
    low: float
    high: float
    x: float
    x_low: float
    x_high: float
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class CurvePlot:
    """A training curve: `raw` and `smooth` are points of an SVG polyline; losses at both ends for people."""

    name: str
    raw: str
    smooth: str
    first: float
    last: float
    steps: int


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram in a square: P(yes) to the right, the share of true yes upwards, its area the count."""

    x: float
    y: float
    y_low: float
    y_high: float
    radius: float
    count: int
    p_yes: float
    share: float


def reliability(bins: Sequence[Mapping[str, Any]], side: float) -> list[Bin]:
    """Place the bins of a reliability diagram in a square of `side` units."""
    most = max((row["count"] for row in bins), default=1)
    return [
        Bin(
            x=round(row["p_yes"] * side, 2),
            y=round((1 - row["share"]) * side, 2),
            y_low=round((1 - row["interval"][0]) * side, 2),
            y_high=round((1 - row["interval"][1]) * side, 2),
            radius=round(2.5 + 6 * math.sqrt(row["count"] / most), 2),
            count=row["count"],
            p_yes=row["p_yes"],
            share=row["share"],
        )
        for row in bins
    ]


def dev_curve(
    points: Sequence[Mapping[str, float]], width: float, height: float, last_step: int, low: float, high: float
) -> list[tuple[float, float]]:
    """Return dev scores as points, on the steps of the loss curve and with `low` and `high` at the lower and upper edge."""
    span = max(high - low, 1e-9)
    return [
        (
            round(point["step"] / max(last_step, 1) * width, 1),
            round(height - (point["dsg"] - low) / span * height, 1),
        )
        for point in sorted(points, key=lambda point: point["step"])
    ]


def axis_around(values: Sequence[float], width: float, include: Sequence[float] = ()) -> Axis:
    """Return an axis that holds all values, with about five round ticks."""
    low, high = min([*values, *include]), max([*values, *include])
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 4)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    ticks = tuple(round(low + index * step, 10) for index in range(round((high - low) / step) + 1))
    return Axis(low, high, width, ticks)


def intervals(rows: Mapping[str, Mapping[str, Any] | None], axis: Axis) -> list[Interval]:
    """Place {name: {"mean", "interval", ...}} on an axis; names without a figure are left out."""
    placed = []
    for name, row in rows.items():
        if row is None:
            continue
        low, high = row["interval"]
        extra = {key: value for key, value in row.items() if key not in ("mean", "interval")}
        placed.append(Interval(name, row["mean"], low, high, axis.x(row["mean"]), axis.x(low), axis.x(high), extra))
    return placed


def curve(
    name: str, points: Sequence[Mapping[str, float]], width: float, height: float, top: float
) -> CurvePlot | None:
    """Return an expert's loss as polylines, the loss `top` at the upper edge; None where there are no points."""
    finite = [point for point in points if math.isfinite(point["loss"])]
    if not finite:
        return None
    losses = [point["loss"] for point in finite]
    window = max(1, len(losses) // 10)
    smooth = [
        sum(part) / len(part) for part in (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))
    ]
    last_step = max(point["step"] for point in finite) or 1

    def polyline(values: Sequence[float]) -> str:
        every = max(1, len(values) // _POINTS)
        return " ".join(
            f"{point['step'] / last_step * width:.1f},{height - min(value / top, 1.0) * height:.1f}"
            for point, value in list(zip(finite, values, strict=True))[::every]
        )

    return CurvePlot(
        name, polyline(losses), polyline(smooth), smooth[min(window, len(smooth)) - 1], smooth[-1], int(last_step)
    )


def _round_step(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= step * 0.999)
