"""What a merge makes of one module: a low-rank or a dense delta, and the best approximation of either at a given rank.

Shapes: I input features, O output features, R rank, K = min(R, O) of a low-rank delta, O of a dense one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selma_ray.adapters.peft_format import LoraFactors

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
        """Return weight + delta in float32, in the weight's shape."""
        return weight_OI.float() + self.D_OI.view(weight_OI.shape)


Delta = LoraFactors | DenseDelta
ToOutputs = Callable[[torch.Tensor], torch.Tensor]
"""From coordinates in a basis of a delta's columns, (K, r), to the outputs, (O, r)."""

# Smallest over largest pivot of a Cholesky factor above which its triangular solve keeps half of float64's digits.
_WELL_CONDITIONED = 1e-4


def truncated(delta: Delta, rank: int) -> LoraFactors:
    """Return the best approximation of `delta` of `rank` in the Frobenius norm (Eckart and Young 1936).

    B holds left singular vectors, each up to its sign, and A what the delta is in their span. Raises no rank: it is at most O.
    """
    gram_KK, to_outputs = _gram_in_column_space(delta)
    B_Or = to_outputs(torch.linalg.eigh(gram_KK).eigenvectors.flip(1)[:, :rank])
    return LoraFactors(delta.module, _projected(delta, B_Or).float(), B_Or.float(), 1.0)


def squared_singular_values(delta: Delta) -> torch.Tensor:
    """Return the K largest squared singular values, falling; their sum is the squared Frobenius norm."""
    return torch.linalg.eigvalsh(_gram_in_column_space(delta)[0]).flip(0).clamp_min(0)


def _gram_in_column_space(delta: Delta) -> tuple[torch.Tensor, ToOutputs]:
    """Return the Gram matrix of the delta's rows in an orthonormal basis of its columns (K, K), and the way back from that basis.

    The Gram matrix's eigenvalues are squared singular values, hence float64. A low-rank delta is never made dense.
    """
    if isinstance(delta, DenseDelta):
        delta_OI = delta.D_OI.double()
        return delta_OI @ delta_OI.T, _unchanged
    core_KR, to_outputs = _column_space(_scaled_b(delta))
    A_RI = delta.A_RI.double()
    return core_KR @ (A_RI @ A_RI.T) @ core_KR.T, to_outputs


def _column_space(B_OR: torch.Tensor) -> tuple[torch.Tensor, ToOutputs]:
    """Return B in an orthonormal basis of its columns, shape (K, R), and the way back from that basis to the outputs.

    The basis is that of a QR decomposition, taken from Cholesky's factor of B^T B, which costs half, where B is far from losing rank.
    """
    if B_OR.shape[1] >= B_OR.shape[0]:
        return B_OR, _unchanged
    lower_RR, failed = torch.linalg.cholesky_ex(B_OR.T @ B_OR)
    diagonal_R = lower_RR.diagonal()
    if not failed and diagonal_R.min() > _WELL_CONDITIONED * diagonal_R.max():
        upper_RR = lower_RR.T
        return upper_RR, lambda x_Rr: B_OR @ torch.linalg.solve_triangular(upper_RR, x_Rr, upper=True)
    basis_OR, upper_RR = torch.linalg.qr(B_OR)
    return upper_RR, lambda x_Rr: basis_OR @ x_Rr


def _projected(delta: Delta, B_Or: torch.Tensor) -> torch.Tensor:
    """Return the delta in the coordinates of orthonormal columns, shape (r, I)."""
    if isinstance(delta, DenseDelta):
        return B_Or.T @ delta.D_OI.double()
    return (B_Or.T @ _scaled_b(delta)) @ delta.A_RI.double()


def _scaled_b(factors: LoraFactors) -> torch.Tensor:
    return factors.scale * factors.B_OR.double()


def _unchanged(x_Or: torch.Tensor) -> torch.Tensor:
    return x_Or
