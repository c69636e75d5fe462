"""Random low-rank factors of one small module, and hypothesis strategies of them."""

import math

import torch
from hypothesis import strategies as st

from selma_ray.adapters.peft_format import LoraFactors

O, I = 12, 9  # noqa: E741


def random_factors(seed: int, rank: int, scale: float, rows: int = O, columns: int = I) -> LoraFactors:
    """Return factors drawn from a standard normal; the expert is named after its seed."""
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, columns, generator=generator)
    return LoraFactors("module", A_RI, torch.randn(rows, rank, generator=generator), scale, f"expert-{seed}")


factors = st.builds(
    random_factors, st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0, math.sqrt(8)])
)
several = st.lists(factors, min_size=1, max_size=5)
alike = st.integers(1, 5).flatmap(
    lambda rank: st.lists(
        st.builds(random_factors, st.integers(0, 10_000), st.just(rank), st.just(2.0)), min_size=1, max_size=5
    )
)


def dense(expert: LoraFactors) -> torch.Tensor:
    """Return an expert's delta in float64."""
    return expert.scale * expert.B_OR.double() @ expert.A_RI.double()


def exact_sum(experts: list[LoraFactors], weights: list[float]) -> torch.Tensor:
    """Return sum_i w_i dW_i in float64."""
    return sum(weight * dense(expert) for expert, weight in zip(experts, weights, strict=True))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare two deltas by the Frobenius norm of their difference."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error < tolerance
