"""Merges that keep experts from undoing one another: TIES, DARE and a merge in a shared basis, all on deltas, not on factors.

Shapes: I input features, O output features, R rank, K experts, S singular vectors.
"""

from collections.abc import Sequence

import torch

from selma_ray.adapters.deltas import DenseDelta
from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.records import seed_of

__all__ = ["dare", "disjoint_mean", "knots", "ties", "trimmed"]

_NULL = 1e-10


def ties(experts: Sequence[LoraFactors], weights: Sequence[float], density: float, scale: float = 1.0) -> DenseDelta:
    """Trim each delta, elect a sign for each entry, and take the mean of those that agree (Yadav et al. 2023, section 3).

    The largest `density` of entries is kept of each module, where the paper takes it of the whole model: a module is all there is
    in memory.
    """
    deltas = [trimmed(expert.delta(), density) for expert in experts]
    return DenseDelta(experts[0].module, scale * disjoint_mean(deltas, weights))


def dare(
    experts: Sequence[LoraFactors], weights: Sequence[float], density: float, seed: int, scale: float = 1.0
) -> DenseDelta:
    """Drop each entry with probability 1 - `density`, divide what is left by `density`, and sum (Yu et al. 2024, section 3.2).

    Its expectation is scale * sum_i w_i dW_i. What is dropped depends on the seed, the expert's name and the module, not on order.
    """
    total_OI: torch.Tensor | None = None
    for expert, weight in zip(experts, weights, strict=True):
        delta_OI = expert.delta()
        generator = torch.Generator().manual_seed(seed_of(seed, expert=expert.expert, module=expert.module))
        kept_OI = torch.rand(delta_OI.shape, generator=generator) < density
        delta_OI.mul_(kept_OI).mul_(scale * weight / density)
        total_OI = delta_OI if total_OI is None else total_OI.add_(delta_OI)
    assert total_OI is not None
    return DenseDelta(experts[0].module, total_OI)


def knots(experts: Sequence[LoraFactors], weights: Sequence[float], density: float, scale: float = 1.0) -> LoraFactors:
    """Merge with TIES in a basis that the experts share (Stoica et al. 2024, section 4).

    [dW_1 ... dW_K] = U S [V_1 ... V_K]^T; the V_i are trimmed and merged, and U S V^T is the result. The decomposition is that of the
    small core between an orthonormal basis of all B_i and one of each A_i, in float64.
    """
    basis_OS, core_SR = torch.linalg.qr(torch.cat([expert.scale * expert.B_OR.double() for expert in experts], dim=1))
    cores, row_bases = [], []
    for expert, core_SR_i in zip(experts, core_SR.split([expert.rank for expert in experts], dim=1), strict=True):
        row_basis_IR, rest_RR = torch.linalg.qr(expert.A_RI.double().T)
        cores.append(core_SR_i @ rest_RR.T)
        row_bases.append(row_basis_IR)
    U_SS, values_S, V_SR = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    # A direction that the experts do not have is noise of length one in V: it must not be among what trimming keeps.
    count = max(1, int((values_S > _NULL * values_S[0]).sum()))
    U_SS, values_S, V_SR = U_SS[:, :count], values_S[:count], V_SR[:count]
    blocks = V_SR.split([core.shape[1] for core in cores], dim=1)
    aligned = [trimmed(block @ rows_IR.T, density) for block, rows_IR in zip(blocks, row_bases, strict=True)]
    A_SI = disjoint_mean(aligned, weights)
    return LoraFactors(experts[0].module, A_SI.float(), (basis_OS @ (U_SS * values_S)).float(), scale)


def trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return `tensor` with all but the largest `density` of its entries, by magnitude, set to zero."""
    dropped = tensor.numel() - max(1, int(density * tensor.numel()))
    if dropped == 0:
        return tensor
    magnitudes = tensor.abs()
    threshold = magnitudes.flatten().kthvalue(dropped + 1).values
    return tensor * (magnitudes >= threshold)


def disjoint_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return, entry by entry, the weighted mean of the deltas whose sign is that of the weighted sum; zeros agree with nothing."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    elected = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    merged, weight_sum = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta * elected > 0
        merged.add_(delta * agrees, alpha=weight)
        weight_sum.add_(agrees, alpha=weight)
    return merged / torch.where(weight_sum == 0, 1.0, weight_sum)
