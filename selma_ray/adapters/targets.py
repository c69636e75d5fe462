"""Which modules of a denoiser an adapter may change: those that can be trained, merged, baked, served and exported alike."""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch

from selma_ray.errors import ConfigError

__all__ = ["adaptable_shapes", "check_targets", "is_adaptable", "sees_rows_together"]

_TOGETHER = {"ZImageTransformer2DModel": ("all_x_embedder.", "cap_embedder.")}
"""Modules, by the start of their names, that a denoiser gives the tokens of all rows of a batch as one."""


def is_adaptable(module: Any) -> TypeGuard[torch.nn.Linear | torch.nn.Conv2d]:
    """Tell whether a module is linear, or a convolution over images whose channels are not grouped."""
    return isinstance(module, torch.nn.Linear) or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)


def adaptable_shapes(denoiser: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of every module that can be adapted, by name."""
    modules: Iterable[tuple[str, Any]] = denoiser.named_modules()
    return {name: tuple(module.weight.shape) for name, module in modules if is_adaptable(module)}


def sees_rows_together(denoiser: torch.nn.Module, module: str) -> bool:
    """Tell whether a module of a denoiser sees the rows of a batch as one, so that they cannot mix experts apart."""
    return module.startswith(_TOGETHER.get(type(denoiser).__name__, ()))


def check_targets(
    denoiser: torch.nn.Module,
    targets: Iterable[str],
    model_name: str,
    *,
    linear_alone: bool = False,
    rows_apart: bool = False,
) -> None:
    """Raise ConfigError where a target names no module, or one that cannot be adapted in every stage.

    A mixture of experts weighs linear modules alone; a service that mixes experts needs modules that see `rows_apart`.
    """
    modules = dict(denoiser.named_modules())
    for target in targets:
        named = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not named:
            raise ConfigError(f"experts.lora.targets must name modules of {model_name}, it has none named {target!r}")
        for name, module in named.items():
            if not is_adaptable(module):
                raise ConfigError(
                    f"experts.lora.targets must name linear modules and convolutions of one group, {target!r} names {name} "
                    f"({type(module).__name__}) of {model_name}; name others"
                )
            if rows_apart and sees_rows_together(denoiser, name):
                raise ConfigError(
                    f"experts.lora.targets must name modules that see the images of a batch apart with serving.experts, {target!r} names "
                    f"{name} of {model_name}; set serving.experts=false, or leave it out"
                )
            if linear_alone and not isinstance(module, torch.nn.Linear):
                raise ConfigError(
                    f"experts.lora.targets must name linear modules alone with experts.moe, {target!r} names {name} "
                    f"({type(module).__name__}) of {model_name}; leave one of them out"
                )
