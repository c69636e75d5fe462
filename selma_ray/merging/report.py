"""What a merge did, module by module: how large the deltas are, how alike the experts are, what truncation would lose.

All of it is computed from the low-rank factors, without a dense delta. Shapes: I inputs, O outputs, R rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from selma_ray.merging.adapters import LoraFactors

__all__ = ["MergeReport", "inner_product", "singular_values"]


class MergeReport:
    """Collects one entry per module; `as_dict` adds the figures of the whole model."""

    def __init__(self, experts: Sequence[str], rank: int) -> None:
        self.experts = list(experts)
        self.rank = rank
        self._modules: dict[str, dict[str, Any]] = {}
        self._gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        self._energy_kept = 0.0
        self._energy = 0.0

    def add(self, experts: Sequence[LoraFactors], merged: LoraFactors) -> None:
        """Measure one module."""
        gram = torch.tensor([[inner_product(one, other) for other in experts] for one in experts], dtype=torch.float64)
        energies = singular_values(merged).double().square()
        energy, kept = float(energies.sum()), float(energies[: self.rank].sum())
        self._gram += gram
        self._energy += energy
        self._energy_kept += kept
        self._modules[merged.module] = {
            "norms": dict(zip(self.experts, (math.sqrt(max(float(x), 0.0)) for x in gram.diagonal()), strict=True)),
            "merged_norm": math.sqrt(energy),
            "cosine": _cosines(gram),
            "energy_kept": kept / energy if energy else 1.0,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the report; `energy_kept` is the share of squared norm that truncation of each module to `rank` keeps."""
        return {
            "experts": self.experts,
            "rank": self.rank,
            "norms": dict(
                zip(self.experts, (math.sqrt(max(float(x), 0.0)) for x in self._gram.diagonal()), strict=True)
            ),
            "merged_norm": math.sqrt(self._energy),
            "cosine": _cosines(self._gram),
            "energy_kept": self._energy_kept / self._energy if self._energy else 1.0,
            "modules": self._modules,
        }


def inner_product(one: LoraFactors, other: LoraFactors) -> float:
    """Return the Frobenius inner product of two deltas, trace((B1^T B2)(A2 A1^T))."""
    BB = one.B_OR.double().T @ other.B_OR.double()
    AA = one.A_RI.double() @ other.A_RI.double().T
    return one.scale * other.scale * float((BB * AA).sum())


def singular_values(factors: LoraFactors) -> torch.Tensor:
    """Return the delta's singular values, falling: a QR of each factor first, so that the SVD is no larger than R x R."""
    R_B = torch.linalg.qr(factors.B_OR.double(), mode="r").R
    R_A = torch.linalg.qr(factors.A_RI.double().T, mode="r").R
    return abs(factors.scale) * torch.linalg.svdvals(R_B @ R_A.T)


def _cosines(gram: torch.Tensor) -> list[list[float]]:
    norms = gram.diagonal().clamp_min(0).sqrt()
    return (gram / (norms[:, None] * norms[None, :]).clamp_min(1e-300)).tolist()
