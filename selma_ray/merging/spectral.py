"""Merges by singular vectors: TSV-M, Iso-C and TIES in Core Space, all through the experts' factors, never a dense delta.

Shapes: I input features, O output features, R rank, T experts, S singular values, Q directions that the experts span.
"""

from collections.abc import Sequence

import torch

from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.merging.interference import disjoint_mean, trimmed

__all__ = ["core_space", "iso_c", "tsv_m"]

_NULL = 1e-10  # of the largest singular value: a direction that is not there


def tsv_m(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Decorrelate the experts' singular vectors and sum what they span (Gargiulo et al. 2024, section 3.2).

    Of each delta the largest min(O, I) / T singular values are kept; the vectors of all, side by side, become the nearest orthonormal
    ones (by whitening, U D V^T -> U V^T), on either side.
    """
    lefts, values, rights = [], [], []
    for expert, weight in zip(experts, weights, strict=True):
        left_OS, values_S, right_IS = _svd(expert)
        kept = max(1, min(left_OS.shape[0], right_IS.shape[0]) // len(experts))
        lefts.append(left_OS[:, :kept])
        values.append(weight * values_S[:kept])
        rights.append(right_IS[:, :kept])
    left_OR, right_IR = (_nearest_orthonormal(torch.cat(each, dim=1)) for each in (lefts, rights))
    return LoraFactors(experts[0].module, right_IR.T.float(), (left_OR * torch.cat(values)).float(), scale)


def iso_c(experts: Sequence[LoraFactors], weights: Sequence[float], scale: float = 1.0) -> LoraFactors:
    """Give every singular direction of the weighted sum of deltas the mean of its singular values (Marczak et al. 2025, section 4.1).

    Directions that a low-rank sum does not have stay away: the mean is over those that it has.
    """
    A_RI = torch.cat([expert.A_RI.double() for expert in experts])
    scaled = [weight * expert.scale * expert.B_OR.double() for expert, weight in zip(experts, weights, strict=True)]
    left_OS, values_S, right_IS = _svd_of(torch.cat(scaled, dim=1), A_RI)
    count = _count(values_S)
    B_OS = left_OS[:, :count] * values_S[:count].mean()
    return LoraFactors(experts[0].module, right_IS[:, :count].T.float(), B_OS.float(), scale)


def core_space(
    experts: Sequence[LoraFactors], weights: Sequence[float], density: float, scale: float = 1.0
) -> LoraFactors:
    """Merge with TIES in the space that all experts' factors span (Panariello et al. 2025, section 3).

    The left singular vectors of [s_1 B_1 ... s_T B_T] and the right ones of [A_1; ...; A_T] are a basis in which each delta is a small
    core without loss; the cores are trimmed to `density` and merged, and the result is what that core is in the basis.
    """
    left_OQ = _basis(torch.cat([expert.scale * expert.B_OR.double() for expert in experts], dim=1))
    right_IQ = _basis(torch.cat([expert.A_RI.double() for expert in experts]).T)
    cores = [
        (left_OQ.T @ (expert.scale * expert.B_OR.double())) @ (expert.A_RI.double() @ right_IQ) for expert in experts
    ]
    merged_QQ = disjoint_mean([trimmed(core, density) for core in cores], weights)
    return LoraFactors(experts[0].module, (merged_QQ @ right_IQ.T).float(), left_OQ.float(), scale)


def _svd(expert: LoraFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an expert's left singular vectors (O, S), values and right singular vectors (I, S), in float64."""
    return _svd_of(expert.scale * expert.B_OR.double(), expert.A_RI.double())


def _svd_of(B_OR: torch.Tensor, A_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular value decomposition of B @ A, of the small core between orthonormal bases of its columns and rows."""
    left, upper_left = torch.linalg.qr(B_OR)
    right, upper_right = torch.linalg.qr(A_RI.T)
    inner_left, values_S, inner_right = torch.linalg.svd(upper_left @ upper_right.T, full_matrices=False)
    return left @ inner_left, values_S, right @ inner_right.T


def _nearest_orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    left, values_S, right = torch.linalg.svd(vectors, full_matrices=False)
    count = _count(values_S)  # what is not there has no direction of its own
    return left[:, :count] @ right[:count]


def _basis(vectors: torch.Tensor) -> torch.Tensor:
    left, values_S, _ = torch.linalg.svd(vectors, full_matrices=False)
    return left[:, : _count(values_S)]


def _count(values_S: torch.Tensor) -> int:
    return max(1, int((values_S > _NULL * values_S[0]).sum()))
