"""Merging experts module by module: pure functions over low-rank factors (SELMA, section 3.4, and later work).

Shapes: I input features, O output features, R rank. An expert's delta is dW_i = s_i B_i A_i, with s_i = alpha / r.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from selma_ray.adapters.deltas import Delta, truncated
from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.errors import AdapterError
from selma_ray.merging.interference import dare, knots, ties
from selma_ray.merging.regmean import InputStatistics, regmean
from selma_ray.merging.spectral import core_space, iso_c, tsv_m

__all__ = [
    "DENSE_METHODS",
    "MEANS",
    "METHODS",
    "MergeMethod",
    "MergeOptions",
    "average_deltas",
    "average_factors",
    "default_weight",
    "released_scale",
    "shares",
    "sum_deltas",
    "svd",
]


@dataclass(frozen=True)
class MergeOptions:
    """Settings of the methods; each reads those that it needs."""

    scale: float = 1.0
    """Factor on the merged delta."""
    rank: int = 0
    """Rank that `svd` truncates to."""
    density: float = 1.0
    """Share of entries that `ties`, `dare`, `knots` and `core_space` keep."""
    seed: int = 0
    """Seed of `dare`."""
    model_name: str = ""
    """Name of the base model, whose length is `released_scale`'s divisor."""
    inputs: InputStatistics | None = None
    """What `regmean` needs of the experts' inputs."""


MergeMethod = Callable[[Sequence[LoraFactors], Sequence[float], MergeOptions], Delta]


def sum_deltas(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Return the exact scale * sum_i w_i dW_i of one module.

    It is held as the concatenation of the factors, [w_i s_i B_i] and [A_i], whose rank is the sum of the experts' ranks, so
    nothing is lost and no cross terms B_i A_j enter.
    """
    A_RI = torch.cat([expert.A_RI.float() for expert in experts])
    B_OR = torch.cat(
        [weight * expert.scale * expert.B_OR.float() for expert, weight in zip(experts, weights, strict=True)], dim=1
    )
    return LoraFactors(experts[0].module, A_RI, B_OR, scale)


def average_deltas(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Return scale times the weighted mean of the deltas: `sum_deltas` at weights that are divided by their sum."""
    return sum_deltas(experts, shares(weights), scale)


def released_scale(experts: Sequence[LoraFactors], model_name: str, scale: float = 1.0) -> LoraFactors:
    """Return the sum of the deltas, each weighed 1 / len(model_name), as SELMA's released code does.

    It means 1/K and divides by the length of a string: 29 for Stable Diffusion 1.4, 30 for 2, 40 for XL. For parity alone.
    """
    return sum_deltas(experts, [default_weight("released_scale", len(experts), model_name)] * len(experts), scale)


def average_factors(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Return the module whose A is the weighted mean of the A_i and whose B that of the B_i, as the paper writes.

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
    weights = shares(weights)
    A_RI = _weighted_sum([expert.A_RI for expert in experts], weights)
    B_OR = _weighted_sum([expert.B_OR for expert in experts], weights)
    return LoraFactors(first.module, A_RI, B_OR, scale * first.scale)


def svd(experts: Sequence[LoraFactors], weights: Sequence[float], rank: int, scale: float = 1.0) -> LoraFactors:
    """Return `average_deltas` cut to `rank`: of all adapters of that rank, the one nearest to the exact mean."""
    return truncated(average_deltas(experts, weights, scale), rank)


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum; raises AdapterError where that is not above 0."""
    total = math.fsum(weights)  # exactly 1 for most K weights of 1/K, which it then leaves as they are
    if total <= 0:
        raise AdapterError(f"weights of a mean must have a sum above 0, got {total:g}; use merging.method sum_deltas")
    return [weight / total for weight in weights]


def default_weight(method: str, num_experts: int, model_name: str) -> float:
    """Return what each expert weighs where a recipe gives no weights: 1/K, or as the method's name says."""
    return {"sum_deltas": 1.0, "tsv_m": 1.0, "distil": 1.0, "released_scale": 1 / len(model_name)}.get(
        method, 1 / num_experts
    )


METHODS: Mapping[str, MergeMethod] = {
    "average_deltas": lambda experts, weights, options: average_deltas(experts, weights, options.scale),
    "average_factors": lambda experts, weights, options: average_factors(experts, weights, options.scale),
    "released_scale": lambda experts, _, options: released_scale(experts, options.model_name, options.scale),
    "sum_deltas": lambda experts, weights, options: sum_deltas(experts, weights, options.scale),
    "svd": lambda experts, weights, options: svd(experts, weights, options.rank, options.scale),
    "ties": lambda experts, weights, options: ties(experts, weights, options.density, options.scale),
    "dare": lambda experts, weights, options: dare(experts, weights, options.density, options.seed, options.scale),
    "knots": lambda experts, weights, options: knots(experts, weights, options.density, options.scale),
    "core_space": lambda experts, weights, options: core_space(experts, weights, options.density, options.scale),
    "tsv_m": lambda experts, weights, options: tsv_m(experts, weights, options.scale),
    "iso_c": lambda experts, weights, options: iso_c(experts, weights, options.scale),
    "regmean": lambda experts, weights, options: _regmean(experts, weights, options),
    "search": lambda experts, weights, options: sum_deltas(experts, weights, options.scale),
    "distil": lambda student, weights, options: sum_deltas(student, weights, options.scale),
}
MEANS = ("average_deltas", "average_factors", "svd")
"""Methods that divide the weights by their sum."""
DENSE_METHODS = ("ties", "dare")
"""Methods whose result is dense; an adapter can only come near to it."""


def _regmean(experts: Sequence[LoraFactors], weights: Sequence[float], options: MergeOptions) -> LoraFactors:
    inputs = options.inputs
    if inputs is None:
        raise AdapterError("merging.method regmean needs a run's own experts and their examples; take another method")
    return regmean(experts, shares(weights), inputs.grams(experts), inputs.off_diagonal, options.scale)


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
