"""How experts are merged (SELMA, section 3.4)."""

from typing import Literal

from selma_ray.config import StrictModel

__all__ = ["MergingConfig"]


class MergingConfig(StrictModel):
    """How skill experts become one model."""

    method: Literal["average_deltas", "average_factors"] = "average_deltas"
    """`average_deltas` is the exact mean of the experts' deltas; `average_factors` averages A and B apart, as the paper writes."""
    weights: dict[str, float] | None = None
    """Weight of each skill; none weighs all the same, 1/K."""
    scale: float = 1.0
    """Factor on the merged delta."""
    name: str = "merged"
    """Name of the merged model's folder."""
