"""Merging experts module by module: pure functions over low-rank factors (SELMA, section 3.4).

Shapes: I input features, O output features, R rank. An expert's delta is dW_i = s_i B_i A_i, with s_i = alpha / r.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from selma_ray.errors import AdapterError
from selma_ray.merging.adapters import LoraFactors

__all__ = ["METHODS", "MergeMethod", "average_deltas", "average_factors"]

MergeMethod = Callable[[Sequence[LoraFactors], Sequence[float], float], LoraFactors]


def average_deltas(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Return the exact scale * sum_i w_i dW_i of one module.

    It is held as the concatenation of the factors, [w_i s_i B_i] and [A_i], whose rank is the sum of the experts' ranks, so
    nothing is lost and no cross terms B_i A_j enter.
    """
    A_RI = torch.cat([expert.A_RI.float() for expert in experts])
    B_OR = torch.cat(
        [weight * expert.scale * expert.B_OR.float() for expert, weight in zip(experts, weights, strict=True)], dim=1
    )
    return LoraFactors(experts[0].module, A_RI, B_OR, scale)


def average_factors(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Return the module whose A is the mean of the A_i and whose B is the mean of the B_i, as the paper writes.

    Not the mean of the deltas: with K experts that share nothing, each keeps about 1 / K^2 of its own delta. Raises
    AdapterError where ranks or scales differ, for the formula has no meaning then.
    """
    first = experts[0]
    for expert in experts:
        if (expert.rank, expert.scale) != (first.rank, first.scale):
            raise AdapterError(
                f"merging.method average_factors needs one rank and one alpha, {first.module} has ranks {first.rank} and "
                f"{expert.rank}, scales {first.scale:g} and {expert.scale:g}; use average_deltas"
            )
    A_RI = _weighted_sum([expert.A_RI for expert in experts], weights)
    B_OR = _weighted_sum([expert.B_OR for expert in experts], weights)
    return LoraFactors(first.module, A_RI, B_OR, scale * first.scale)


METHODS: Mapping[str, MergeMethod] = {"average_deltas": average_deltas, "average_factors": average_factors}


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
