"""One trainable adapter on a frozen denoiser, which takes part where it is asked to: a student beside the experts that teach it.

As hooks where gradients flow through it, as part of the weights where it draws.

Shapes: I input features, O output features, R rank.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from selma_ray.adapters.peft_format import LoraFactors

__all__ = ["Student"]


class Student:
    """Hooks that add an adapter's deltas to a denoiser while it is `present`; its factors are trained in fp32."""

    def __init__(self, denoiser: torch.nn.Module, start: Iterable[LoraFactors]) -> None:
        denoiser.requires_grad_(False)
        self._denoiser = denoiser
        self._present = False
        self._factors: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        for factors in start:
            module: Any = denoiser.get_submodule(factors.module)
            device = module.weight.device
            A_RI = torch.nn.Parameter(factors.A_RI.float().to(device).clone())
            B_OR = torch.nn.Parameter((factors.scale * factors.B_OR.float()).to(device).clone())
            self._factors[factors.module] = (A_RI, B_OR)
            module.register_forward_hook(self._hook(factors.module))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return all factors, in a fixed order."""
        return [each for pair in self._factors.values() for each in pair]

    def factors(self) -> Iterator[LoraFactors]:
        """Yield the factors as they are now."""
        for module, (A_RI, B_OR) in self._factors.items():
            yield LoraFactors(module, A_RI.detach().cpu().clone(), B_OR.detach().cpu().clone(), 1.0)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Let the student take part in the calls of the denoiser within the block."""
        self._present = True
        try:
            yield
        finally:
            self._present = False

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Make the student part of the denoiser's weights within the block, where it costs nothing a call; they come back to the bit."""
        weights: dict[str, Any] = {name: self._denoiser.get_submodule(name).weight for name in self._factors}
        base = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, (A_RI, B_OR) in self._factors.items():
                    weights[name].copy_(base[name] + (B_OR @ A_RI).view(base[name].shape))
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(base[name])

    def _hook(self, module_name: str) -> Callable[..., torch.Tensor]:
        def add_delta(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if not self._present:
                return output
            A_RI, B_OR = (factor.to(inputs[0].dtype) for factor in self._factors[module_name])
            if isinstance(module, torch.nn.Conv2d):
                A_RIkk = A_RI.view(-1, *module.weight.shape[1:])
                conv2d = torch.nn.functional.conv2d
                inner = conv2d(inputs[0], A_RIkk, None, module.stride, module.padding, module.dilation)
                return output + conv2d(inner, B_OR[:, :, None, None])
            return output + (inputs[0] @ A_RI.T) @ B_OR.T

        return add_delta
