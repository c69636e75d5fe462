"""The shape of a LoRA adapter."""

from pydantic import Field

from selma_ray.config import StrictModel

__all__ = ["LoraSettings"]


class LoraSettings(StrictModel):
    """The adapter's shape."""

    rank: int = Field(default=128, ge=1)
    """Rank r of the adapter."""
    alpha: float = Field(default=128, gt=0)
    """Numerator of the adapter's scale alpha/r."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the modules that get an adapter."""
