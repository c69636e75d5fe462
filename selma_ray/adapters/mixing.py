"""Experts on one base denoiser, weighed apart for each row of a batch.

A row n with weights w_nk gets the output of W x + sum_k w_nk B_k A_k x: what PEFT's `set_adapters` gives a whole batch. The
factors of the experts in use are stacked, so that a module costs two more products, however many mixes share the batch.

Shapes: N rows, I input features, O output features, R summed ranks of the experts in use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selma_ray.adapters.mixes import Mix
from selma_ray.adapters.targets import is_adaptable, sees_rows_together
from selma_ray.errors import AdapterError

__all__ = ["Expert", "ExpertLayers", "LowRank", "fitted_expert"]


@dataclass(frozen=True)
class LowRank:
    """The delta B_OR @ A_RI of one module; an adapter's scale is folded into B."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor


Expert = Mapping[str, LowRank]
"""An expert's deltas by the names of the denoiser's modules."""


@dataclass(frozen=True)
class _Stack:
    """One module's factors of all experts in use, one above the other."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    experts: torch.Tensor
    """To which of the experts in use each rank belongs."""


class ExpertLayers:
    """Hooks that add experts to a denoiser; until `weigh` names mixes, and for rows without experts, it is the base.

    Raises AdapterError where an expert adapts a module that the denoiser does not have, or has in another shape.
    """

    def __init__(self, denoiser: torch.nn.Module, experts: Mapping[str, Expert]) -> None:
        self._denoiser = denoiser
        self._experts: dict[str, Expert] = {}
        self._hooked: set[str] = set()
        self._active: tuple[str, ...] = ()
        self._stacks: dict[str, _Stack | None] = {}
        self._weights_NK: torch.Tensor | None = None
        for name, expert in experts.items():
            self.add(name, fitted_expert(name, expert, denoiser))

    def add(self, name: str, fitted: Expert) -> None:
        """Add what `fitted_expert` returned, between two calls of the denoiser."""
        self._experts[name] = fitted
        for module_name in sorted(set(fitted) - self._hooked):
            self._denoiser.get_submodule(module_name).register_forward_hook(self._hook(module_name))
        self._hooked |= set(fitted)

    def remove(self, name: str) -> None:
        """Forget an expert that no mix names any more, between two calls of the denoiser; its hooks stay, which then do nothing."""
        self._experts.pop(name, None)
        if name in self._active:
            self._active, self._stacks, self._weights_NK = (), {}, None

    def weigh(self, mixes_N: Sequence[Mix]) -> None:
        """Set the mix of each row for the calls of the denoiser that follow."""
        active = tuple(sorted({name for mix in mixes_N for name, weight in mix if weight}))
        if not active:
            self._weights_NK = None
            return
        if active != self._active:
            self._active, self._stacks = active, {}
        rows = [[dict(mix).get(name, 0.0) for name in active] for mix in mixes_N]
        self._weights_NK = torch.tensor(rows, device=self._denoiser.device, dtype=self._denoiser.dtype)

    def _hook(self, module_name: str) -> Callable[..., torch.Tensor]:
        def add_deltas(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            stack = self._stack(module_name) if self._weights_NK is not None else None
            if stack is None or self._weights_NK is None:
                return output
            rows = inputs[0]
            weights_NR = self._weights_NK[:, stack.experts]
            if len(rows) != len(weights_NR):
                raise AdapterError(
                    f"{module_name} sees the tokens of all rows as one, so that they cannot mix experts apart; serve with "
                    "serving.experts=false, or fit experts without it"
                )
            if isinstance(module, torch.nn.Conv2d):
                return output + _convolved(module, rows, stack, weights_NR)
            weights = weights_NR.view(len(rows), *(1,) * (rows.dim() - 2), -1)
            return output + ((rows @ stack.A_RI.T) * weights) @ stack.B_OR.T

        return add_deltas

    def _stack(self, module_name: str) -> _Stack | None:
        """Return the factors of the experts in use, none where none adapts the module; kept until others are in use."""
        if module_name not in self._stacks:
            parts = {
                k: self._experts[name][module_name]
                for k, name in enumerate(self._active)
                if module_name in self._experts[name]
            }
            self._stacks[module_name] = _stacked(parts) if parts else None
        return self._stacks[module_name]


def _convolved(
    module: torch.nn.Conv2d, rows_NIHW: torch.Tensor, stack: _Stack, weights_NR: torch.Tensor
) -> torch.Tensor:
    """Return the deltas of a convolution: A has its kernel, stride and padding, B is one of 1 x 1."""
    A_RIkk = stack.A_RI.view(-1, *module.weight.shape[1:])
    inner_NRhw = torch.nn.functional.conv2d(rows_NIHW, A_RIkk, None, module.stride, module.padding, module.dilation)
    return torch.nn.functional.conv2d(inner_NRhw * weights_NR[:, :, None, None], stack.B_OR[:, :, None, None])


def _stacked(parts: Mapping[int, LowRank]) -> _Stack:
    owners = [k for k, part in parts.items() for _ in range(len(part.A_RI))]
    A_RI = torch.cat([part.A_RI for part in parts.values()])
    B_OR = torch.cat([part.B_OR for part in parts.values()], dim=1)
    return _Stack(A_RI, B_OR, torch.tensor(owners, device=A_RI.device))


def fitted_expert(name: str, expert: Expert, denoiser: torch.nn.Module) -> dict[str, LowRank]:
    """Return an expert's factors in a denoiser's precision and on its device; raises AdapterError where it does not fit."""
    modules: dict[str, Any] = dict(denoiser.named_modules())
    fitted = {}
    for module_name, delta in expert.items():
        shape = (len(delta.B_OR), delta.A_RI.shape[1])
        module = modules.get(module_name)
        if not is_adaptable(module) or tuple(module.weight.flatten(1).shape) != shape:
            raise AdapterError(
                f"expert {name}: {module_name} must be a linear module or a convolution of shape {shape} in the model that is served; "
                "serve experts with the model they were fitted to"
            )
        if sees_rows_together(denoiser, module_name):
            raise AdapterError(
                f"expert {name}: {module_name} sees the tokens of all rows of a batch as one, so that they cannot mix experts apart; serve "
                "with serving.experts=false, or fit experts without it"
            )
        device, dtype = module.weight.device, module.weight.dtype
        fitted[module_name] = LowRank(delta.A_RI.to(device, dtype), delta.B_OR.to(device, dtype))
    return fitted
