"""What a merge did, module by module: how large and how alike the experts are, where they oppose one another, what truncation loses.

Shapes: I inputs, O outputs, R rank, K experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from selma_ray.adapters.deltas import Delta, squared_singular_values
from selma_ray.adapters.peft_format import LoraFactors

__all__ = ["MergeReport", "inner_product", "sign_conflicts"]


class MergeReport:
    """Collects one entry per module; `as_dict` adds the figures of the whole model."""

    def __init__(self, experts: Sequence[str], rank: int) -> None:
        self.experts = list(experts)
        self.rank = rank
        self._modules: dict[str, dict[str, Any]] = {}
        self._gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        self._energy_kept = 0.0
        self._energy = 0.0
        self._conflicts = 0.0
        self._entries = 0

    def add(self, experts: Sequence[LoraFactors], merged: Delta) -> None:
        """Measure one module."""
        gram = torch.tensor([[inner_product(one, other) for other in experts] for one in experts], dtype=torch.float64)
        energies = squared_singular_values(merged)
        energy, kept = float(energies.sum()), float(energies[: self.rank].sum())
        conflicts, entries = sign_conflicts(experts)
        self._gram += gram
        self._energy += energy
        self._energy_kept += kept
        self._conflicts += conflicts * entries
        self._entries += entries
        self._modules[merged.module] = {
            "norms": self._norms(gram),
            "merged_norm": math.sqrt(energy),
            "cosine": _cosines(gram),
            "sign_conflicts": conflicts,
            "energy_kept": kept / energy if energy else 1.0,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the report.

        `energy_kept` is the share of squared norm that truncating each module to `rank` keeps, `sign_conflicts` the share of entries on
        which at least one expert pulls up and another down.
        """
        return {
            "experts": self.experts,
            "rank": self.rank,
            "norms": self._norms(self._gram),
            "merged_norm": math.sqrt(self._energy),
            "cosine": _cosines(self._gram),
            "sign_conflicts": self._conflicts / self._entries if self._entries else 0.0,
            "energy_kept": self._energy_kept / self._energy if self._energy else 1.0,
            "modules": self._modules,
        }

    def _norms(self, gram: torch.Tensor) -> dict[str, float]:
        return dict(zip(self.experts, gram.diagonal().clamp_min(0).sqrt().tolist(), strict=True))


def inner_product(one: LoraFactors, other: LoraFactors) -> float:
    """Return the Frobenius inner product of two deltas, trace((B1^T B2)(A2 A1^T)), without a dense delta."""
    BB = one.B_OR.double().T @ other.B_OR.double()
    AA = one.A_RI.double() @ other.A_RI.double().T
    return one.scale * other.scale * float((BB * AA).sum())


def sign_conflicts(experts: Sequence[LoraFactors]) -> tuple[float, int]:
    """Return the share of a module's entries where deltas of both signs meet, and the number of its entries."""
    up = down = None
    for expert in experts:
        delta_OI = expert.delta()
        up = delta_OI > 0 if up is None else up.logical_or_(delta_OI > 0)
        down = delta_OI < 0 if down is None else down.logical_or_(delta_OI < 0)
    assert up is not None
    assert down is not None
    return int((up & down).sum()) / up.numel(), up.numel()


def _cosines(gram: torch.Tensor) -> list[list[float]]:
    norms = gram.diagonal().clamp_min(0).sqrt()
    return (gram / (norms[:, None] * norms[None, :]).clamp_min(1e-300)).tolist()
