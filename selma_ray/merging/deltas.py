"""What a merge makes of one module: a low-rank or a dense delta, and the best approximation of either at a given rank.

Shapes: I input features, O output features, R rank, K = min(R, O) of a low-rank delta, O of a dense one.
"""

from dataclasses import dataclass

import torch

from selma_ray.merging.adapters import LoraFactors

__all__ = ["Delta", "DenseDelta", "squared_singular_values", "truncated"]


@dataclass(frozen=True)
class DenseDelta:
    """A delta that few factors do not hold, such as one with entries left out; float32, shape (O, I)."""

    module: str
    D_OI: torch.Tensor

    def delta(self) -> torch.Tensor:
        """Return the delta itself."""
        return self.D_OI

    def added_to(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return weight + delta in float32."""
        return weight_OI.float() + self.D_OI


Delta = LoraFactors | DenseDelta


def truncated(delta: Delta, rank: int) -> LoraFactors:
    """Return the best approximation of `delta` of `rank` in the Frobenius norm (Eckart and Young 1936).

    B holds left singular vectors, each up to its sign, and A what the delta is in their span. Raises no rank: it is at most O.
    """
    basis_OK, gram_KK = _gram_in_column_space(delta)
    leading_Kr = torch.linalg.eigh(gram_KK).eigenvectors.flip(1)[:, :rank]
    B_Or = leading_Kr if basis_OK is None else basis_OK @ leading_Kr
    A_rI = _projected(delta, B_Or)
    return LoraFactors(delta.module, A_rI.float(), B_Or.float(), 1.0)


def squared_singular_values(delta: Delta) -> torch.Tensor:
    """Return the K largest squared singular values, falling; their sum is the squared Frobenius norm."""
    return torch.linalg.eigvalsh(_gram_in_column_space(delta)[1]).flip(0).clamp_min(0)


def _gram_in_column_space(delta: Delta) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return an orthonormal basis (O, K) of the delta's columns, None for that of the outputs, and the Gram matrix in it (K, K).

    The Gram matrix's eigenvalues are squared singular values, hence float64. A low-rank delta is never made dense: QR of B first.
    """
    if isinstance(delta, DenseDelta):
        delta_OI = delta.D_OI.double()
        return None, delta_OI @ delta_OI.T
    basis_OK, core_KR = None, _scaled_b(delta)
    if core_KR.shape[1] < core_KR.shape[0]:
        basis_OK, core_KR = torch.linalg.qr(core_KR)
    A_RI = delta.A_RI.double()
    return basis_OK, core_KR @ (A_RI @ A_RI.T) @ core_KR.T


def _projected(delta: Delta, B_Or: torch.Tensor) -> torch.Tensor:
    """Return the delta in the coordinates of orthonormal columns, shape (r, I)."""
    if isinstance(delta, DenseDelta):
        return B_Or.T @ delta.D_OI.double()
    return (B_Or.T @ _scaled_b(delta)) @ delta.A_RI.double()


def _scaled_b(factors: LoraFactors) -> torch.Tensor:
    return factors.scale * factors.B_OR.double()
