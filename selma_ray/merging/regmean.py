"""RegMean (Jin et al. 2023, 2212.09849): the merge whose outputs are nearest to each expert's on that expert's own inputs.

Shapes: I input features (of a convolution, those of its kernel), O output features, R rank, N rows of inputs. The inputs of expert i at a
module are X_i (N, I), of which the Gram matrix G_i = X_i^T X_i is all that is needed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.errors import AdapterError, first_line

__all__ = ["InputStatistics", "recorded_grams", "regmean", "write_grams"]

_RIDGE = 1e-9  # of the mean diagonal entry: a feature that no expert ever sees has no say


def regmean(
    experts: Sequence[LoraFactors],
    weights: Sequence[float],
    grams: Sequence[torch.Tensor],
    off_diagonal: float,
    scale: float = 1.0,
) -> LoraFactors:
    """Return scale * (sum_i w_i dW_i G_i) (sum_i w_i G_i)^-1, equation 2 with the base model's weight taken out of it.

    Entries of the Gram matrices (I, I) off their diagonals count by `off_diagonal` (section 4.2). The result is as low in rank as the sum
    of the deltas is.
    """
    shrunk = [_shrunk(gram.double(), off_diagonal) for gram in grams]
    total_II = sum(weight * gram for weight, gram in zip(weights, shrunk, strict=True))
    assert isinstance(total_II, torch.Tensor)
    ridge = _RIDGE * total_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    total_II = total_II + ridge * torch.eye(len(total_II), dtype=torch.float64)
    A_RI = torch.cat([expert.A_RI.double() @ gram for expert, gram in zip(experts, shrunk, strict=True)])
    B_OR = torch.cat(
        [weight * expert.scale * expert.B_OR.double() for expert, weight in zip(experts, weights, strict=True)], dim=1
    )
    solved_RI = torch.linalg.solve(total_II, A_RI.T).T  # total_II is symmetric
    return LoraFactors(experts[0].module, solved_RI.float(), B_OR.float(), scale)


def _shrunk(gram_II: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    return off_diagonal * gram_II + (1 - off_diagonal) * torch.diag(gram_II.diagonal())


@dataclass(frozen=True)
class InputStatistics:
    """Gram matrices of the inputs of each expert's modules, in files that `write_grams` wrote; read one at a time."""

    paths: Mapping[str, str]
    """Local files by the expert's name."""
    off_diagonal: float = 0.9

    @cached_property
    def _files(self) -> dict[str, Any]:
        files = {}
        for name, path in self.paths.items():
            try:
                files[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise AdapterError(
                    f"{path} must hold the inputs of expert {name} ({first_line(error)}); delete it and merge again"
                ) from None
        return files

    def grams(self, experts: Sequence[LoraFactors]) -> list[torch.Tensor]:
        """Return the Gram matrix of each expert's inputs at its module; raises AdapterError where one was not recorded."""
        return [self._gram(expert) for expert in experts]

    def _gram(self, expert: LoraFactors) -> torch.Tensor:
        try:
            return self._files[expert.expert].get_tensor(expert.module)
        except (KeyError, SafetensorError):
            raise AdapterError(
                f"merging.method regmean needs the inputs of {expert.module} of expert {expert.expert}, which were not recorded; "
                "delete the experts' inputs.safetensors and merge again"
            ) from None


@contextmanager
def recorded_grams(denoiser: torch.nn.Module, modules: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the Gram matrices (I, I), in fp32 in the host's memory, of all that some modules are given within the block, by module."""
    grams: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows_NI = _rows(module, inputs[0].detach())
            gram_II = (rows_NI.T @ rows_NI).cpu()
            grams[name] = grams[name] + gram_II if name in grams else gram_II

        return hook

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(record(name)) for name in modules]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def write_grams(path: Path, grams: Mapping[str, torch.Tensor]) -> None:
    """Write Gram matrices by module."""
    save_file({name: gram.contiguous() for name, gram in grams.items()}, path)


def _rows(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return a module's inputs as rows (N, I): of a convolution, those under its kernel at each place."""
    if isinstance(module, torch.nn.Conv2d):
        columns = torch.nn.functional.unfold(
            inputs.float(), module.kernel_size, module.dilation, module.padding, module.stride
        )
        return columns.transpose(1, 2).flatten(0, 1)
    return inputs.float().flatten(0, -2)
