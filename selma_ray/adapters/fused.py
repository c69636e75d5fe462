"""K adapters on one base denoiser in one forward pass: each row of a batch goes through its own, with gradients.

A batch holds the rows of the first adapter, then those of the second, and so on, the same number of each. The base's share of a module is
computed for all rows at once, the adapters' shares as one batched product.

Shapes: K adapters, N rows in all, I input features, O output features, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.peft_format import LoraFactors, Shape
from selma_ray.adapters.training import add_adapter, trainable_parameters
from selma_ray.errors import ConfigError

__all__ = ["FusedAdapters"]


@dataclass(frozen=True)
class _Factors:
    A_KRI: torch.nn.Parameter
    B_KOR: torch.nn.Parameter
    shape: Shape


class FusedAdapters:
    """The factors of K adapters, in fp32, and the hooks through which they take part; all start as PEFT starts one."""

    def __init__(
        self, denoiser: torch.nn.Module, settings: LoraSettings, count: int, model_name: str, seed: int
    ) -> None:
        self.count = count
        self.rank = settings.rank
        self._scale = settings.alpha / settings.rank
        started = add_adapter(denoiser, settings, model_name, seed)
        first = {name: weight.detach().float().clone() for name, weight in trainable_parameters(started).items()}
        self.denoiser: Any = started.unload()
        self.denoiser.requires_grad_(False)
        self.factors = {module: self._started(module, first) for module in _modules(first)}
        for module in self.factors:
            self.denoiser.get_submodule(module).register_forward_hook(self._hook(module))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return all factors, in a fixed order, each K first."""
        return [each for factors in self.factors.values() for each in (factors.A_KRI, factors.B_KOR)]

    def to(self, device: torch.device) -> "FusedAdapters":
        """Move the base and the factors onto a device."""
        self.denoiser.to(device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)
        return self

    def adapter(self, k: int) -> Iterator[LoraFactors]:
        """Yield the factors of adapter `k`, module by module."""
        for module, factors in self.factors.items():
            A_RI, B_OR = (each.detach()[k].float().cpu().clone() for each in (factors.A_KRI, factors.B_KOR))
            yield LoraFactors(module, A_RI, B_OR, self._scale)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each adapted module's weight."""
        return {module: factors.shape for module, factors in self.factors.items()}

    @contextmanager
    def using(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let other factors, in the order of `parameters`, take the place of these."""
        own = [parameter.data for parameter in self.parameters()]
        self._put(weights)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, weights: Sequence[torch.Tensor]) -> None:
        for parameter, weight in zip(self.parameters(), weights, strict=True):
            parameter.data = weight

    def _started(self, module: str, first: dict[str, torch.Tensor]) -> _Factors:
        base = self.denoiser.get_submodule(module)
        A_RI, B_OR = (
            next(weight for name, weight in first.items() if f".{module}.lora_{side}." in name).flatten(1)
            for side in "AB"
        )
        A_KRI, B_KOR = (torch.nn.Parameter(each.repeat(self.count, 1, 1)) for each in (A_RI, B_OR))
        return _Factors(A_KRI, B_KOR, tuple(base.weight.shape))

    def _hook(self, module_name: str) -> Callable[..., torch.Tensor]:
        factors = self.factors[module_name]

        def add_deltas(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            rows = inputs[0]
            if len(rows) % self.count:
                raise ConfigError(
                    f"{module_name} sees the tokens of all rows as one, so that none has an adapter of its own; set experts.fused=false"
                )
            if isinstance(module, torch.nn.Conv2d):
                return output + self._convolved(module, rows, factors)
            A_KRI, B_KOR = factors.A_KRI.to(rows.dtype), factors.B_KOR.to(rows.dtype)
            rows_KMI = rows.reshape(self.count, -1, rows.shape[-1])
            delta_KMO = (rows_KMI @ A_KRI.transpose(1, 2)) @ B_KOR.transpose(1, 2)
            return output + self._scale * delta_KMO.reshape(output.shape)

        return add_deltas

    def _convolved(self, module: torch.nn.Conv2d, rows_NIHW: torch.Tensor, factors: _Factors) -> torch.Tensor:
        """Return the deltas of a convolution: the adapters are groups of channels."""
        conv2d, count = torch.nn.functional.conv2d, self.count
        A = factors.A_KRI.to(rows_NIHW.dtype).reshape(-1, *factors.shape[1:])
        B = factors.B_KOR.to(rows_NIHW.dtype).flatten(0, 1)[:, :, None, None]
        grouped = rows_NIHW.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        inner = conv2d(grouped, A, None, module.stride, module.padding, module.dilation, count)
        delta = conv2d(inner, B, None, groups=count)
        return self._scale * delta.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def _modules(weights: dict[str, torch.Tensor]) -> list[str]:
    prefix = "base_model.model."
    return [name.removeprefix(prefix).partition(".lora_A.")[0] for name in weights if ".lora_A." in name]
