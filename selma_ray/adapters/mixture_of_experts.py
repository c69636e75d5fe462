"""MoE-LoRA, SELMA's alternative to merging (section 5.2): frozen experts, which a linear router in each module weighs for each token.

A module's output is W x + sum_k softmax(G x)_k dW_k x. The weights depend on the input, so a mixture is no LoRA and has no dense
weights: it cannot be merged, baked or exported, and is rendered with its routers in place. Its folder is laid out as PEFT's are, with
`peft_type: MOE_LORA`, so that whatever reads plain LoRA refuses it by name.

Shapes: I input features, O output features, K experts, R ranks of all experts together.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from selma_ray.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from selma_ray.errors import AdapterError
from selma_ray.storage import RunFolder

__all__ = ["MIXTURE_TYPE", "Factors", "add_mixture", "is_mixture", "load_mixture", "read_experts", "write_mixture"]

MIXTURE_TYPE = "MOE_LORA"
_PREFIX, _ROUTER = "base_model.model.", ".router_KI"


class Factors(NamedTuple):
    """The experts of one module, one below the other; scales are folded into B."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    ranks: tuple[int, ...]


class _Mixture(torch.nn.Module):
    """A linear module with routed experts; only the router is trained, and starts as the plain mean of the experts."""

    def __init__(self, base: torch.nn.Linear, factors: Factors) -> None:
        super().__init__()
        self.base = base
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A_RI = torch.nn.Parameter(factors.A_RI.to(**place), requires_grad=False)
        self.B_OR = torch.nn.Parameter(factors.B_OR.to(**place), requires_grad=False)
        self.router_KI = torch.nn.Parameter(torch.zeros(len(factors.ranks), base.in_features, **place))
        owners = [expert for expert, rank in enumerate(factors.ranks) for _ in range(rank)]
        self.register_buffer("owners_R", torch.tensor(owners, device=base.weight.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output and the weighed experts', over the last axis of `x`."""
        linear = torch.nn.functional.linear
        weights = linear(x, self.router_KI).float().softmax(-1).to(x.dtype)
        return self.base(x) + linear(linear(x, self.A_RI) * weights[..., self.owners_R], self.B_OR)


def add_mixture(
    denoiser: torch.nn.Module, experts: Mapping[str, Factors], routers: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Put the experts of each module into `denoiser`, everything frozen but the routers, which are `routers` where given.

    Raises AdapterError for a module that is not the denoiser's, or no linear one of the factors' shape.
    """
    denoiser.requires_grad_(False)
    modules = dict(denoiser.named_modules())
    for name, factors in experts.items():
        base, shape = modules.get(name), (len(factors.B_OR), factors.A_RI.shape[1])
        if not isinstance(base, torch.nn.Linear) or tuple(base.weight.shape) != shape:
            raise AdapterError(
                f"a mixture's module {name} must be a linear one of shape {shape} in the denoiser; mix experts of this base, "
                "of linear modules alone"
            )
        mixture = _Mixture(base, factors)
        if routers is not None:
            mixture.router_KI.data.copy_(routers[name])
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, mixture)


def read_experts(folders: Sequence[Path]) -> dict[str, Factors]:
    """Return the experts of each module from folders of plain LoRA adapters, in order; raises AdapterError where they do not fit."""
    weights, scales = [], []
    for folder in folders:
        config = _read_config(folder)
        weights.append(_read_weights(folder))
        scales.append(config["lora_alpha"] / config["r"])
    names = [
        sorted(key.removesuffix(".lora_A.weight") for key in each if key.endswith(".lora_A.weight")) for each in weights
    ]
    for folder, of_expert in zip(folders, names, strict=True):
        if of_expert != names[0]:
            raise AdapterError(f"{folder} and {folders[0]} must adapt the same modules; train both alike")
    return {
        key.removeprefix(_PREFIX): _stacked(
            [each[f"{key}.lora_A.weight"] for each in weights],
            [scale * each[f"{key}.lora_B.weight"] for scale, each in zip(scales, weights, strict=True)],
        )
        for key in names[0]
    }


def write_mixture(
    folder: RunFolder,
    directory: str,
    names: Sequence[str],
    experts: Mapping[str, Factors],
    routers: Mapping[str, torch.Tensor],
    base_model: str,
    revision: str | None,
) -> None:
    """Write experts and routers to one folder; adapter_config.json comes last and means that the rest is there.

    `routers` are named as the denoiser's parameters are: module, then router_KI.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, factors in experts.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.A_RI.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.B_OR.float().contiguous()
        tensors[f"{_PREFIX}{module}{_ROUTER}"] = routers[f"{module}{_ROUTER}"].float().contiguous()
    config: dict[str, Any] = {
        "peft_type": MIXTURE_TYPE,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "experts": list(names),
        "ranks": list(next(iter(experts.values())).ranks),
    }
    folder.write_bytes(save(tensors), directory, WEIGHTS_FILE)
    folder.write_json(config, directory, CONFIG_FILE)


def is_mixture(folder: str | Path) -> bool:
    """Tell whether an adapter's folder holds a mixture."""
    return _read_config(Path(folder)).get("peft_type") == MIXTURE_TYPE


def load_mixture(denoiser: torch.nn.Module, folder: str | Path) -> None:
    """Put a mixture that `write_mixture` wrote into `denoiser`; raises AdapterError where it is not whole or does not fit."""
    folder = Path(folder)
    tensors, ranks = _read_weights(folder), tuple(_read_config(folder).get("ranks", ()))
    modules = [key.removesuffix(_ROUTER) for key in tensors if key.endswith(_ROUTER)]
    experts, routers = {}, {}
    for key in modules:
        try:
            A_RI, B_OR = (tensors[f"{key}.lora_{side}.weight"] for side in "AB")
        except KeyError as error:
            raise AdapterError(f"{folder / WEIGHTS_FILE}: {error} is missing; train this mixture again") from None
        router_KI = tensors[f"{key}{_ROUTER}"]
        if len(A_RI) != sum(ranks) or B_OR.shape[1] != sum(ranks) or router_KI.shape != (len(ranks), A_RI.shape[1]):
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: {key} must have factors and routers of ranks {ranks}, has shapes {tuple(A_RI.shape)}, "
                f"{tuple(B_OR.shape)} and {tuple(router_KI.shape)}; train this mixture again"
            )
        module = key.removeprefix(_PREFIX)
        experts[module], routers[module] = Factors(A_RI, B_OR, ranks), router_KI
    if not experts:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no routers; train this mixture again")
    add_mixture(denoiser, experts, routers)


def _stacked(A_parts: Sequence[torch.Tensor], B_parts: Sequence[torch.Tensor]) -> Factors:
    return Factors(torch.cat(list(A_parts)), torch.cat(list(B_parts), dim=1), tuple(len(part) for part in A_parts))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); train this expert again") from None


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}); it is missing or truncated, train this expert again"
        ) from None
    broken = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise AdapterError(f"{path}: {broken} must be finite, holds NaN or infinity; train this expert again")
    return tensors
