"""Reading and writing LoRA adapters in PEFT's folder format, strictly and one module at a time.

Shapes: I input features, O output features, R rank. The delta of a module is scale * B_OR @ A_RI.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from selma_ray.adapters.files import CONFIG_FILE, WEIGHTS_FILE, local_adapter
from selma_ray.adapters.streaming import TensorSpec, write_safetensors
from selma_ray.errors import AdapterError

__all__ = ["Adapter", "LoraFactors", "open_adapter", "shapes_of", "write_adapter"]

_PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Settings that change what a delta is, each with the values under which it is scale * B @ A.
_PLAIN_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": ([], None),
}
# Initialisations that also change the base model's weights.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank factors of one module."""

    module: str
    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scale: float
    expert: str = ""
    """Name of the expert they belong to; empty for a merge."""

    @property
    def rank(self) -> int:
        """Return R."""
        return self.A_RI.shape[0]

    def delta(self) -> torch.Tensor:
        """Return the dense delta in float32, shape (O, I)."""
        return (self.B_OR.float() * self.scale) @ self.A_RI.float()

    def added_to(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return weight + delta in float32, in one pass over the weight."""
        return torch.addmm(weight_OI.float(), self.B_OR.float(), self.A_RI.float(), alpha=self.scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose configuration and tensor names are checked; tensors are read as they are asked for."""

    folder: Path
    base_model: str | None
    rank: int
    scale: float
    modules: tuple[str, ...]
    revision: str | None = None
    """Revision of the base model that it was fitted to, where the adapter says so."""

    @cached_property
    def _tensors(self) -> Any:
        return safe_open(self.folder / WEIGHTS_FILE, framework="pt")

    def factors(self, module: str) -> LoraFactors:
        """Read one module; raises AdapterError where a tensor is not finite."""
        A_RI, B_OR = (self._tensors.get_tensor(_key(module, side)) for side in "AB")
        for side, tensor in (("A", A_RI), ("B", B_OR)):
            # The sum is not finite where an entry is not, and reads the tensor once, where isfinite would write another.
            if not math.isfinite(tensor.sum(dtype=torch.float64)):
                raise AdapterError(
                    f"{self.folder / WEIGHTS_FILE}: {_key(module, side)} must be finite, holds NaN or infinity; train this expert again"
                )
        return LoraFactors(module, A_RI, B_OR, self.scale, self.folder.name)

    def __iter__(self) -> Iterator[LoraFactors]:
        return map(self.factors, self.modules)


def open_adapter(folder: str | Path) -> Adapter:
    """Open an adapter folder (a path, or a URI); raises AdapterError, naming file, key and remedy, where it is no plain LoRA adapter."""
    folder = local_adapter(folder)
    config = _read_config(folder)
    rank = config["r"]
    shapes = _read_shapes(folder)
    modules = tuple(sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in shapes}))
    for module in modules:
        _check_shapes(folder / WEIGHTS_FILE, module, shapes, rank)
    base_model, revision = config.get("base_model_name_or_path"), config.get("revision")
    return Adapter(folder, base_model, rank, _scale(config), modules, revision)


def shapes_of(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every module; raises AdapterError where adapters differ in modules, shapes or base model."""
    first = adapters[0]
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        if adapter.modules != first.modules:
            odd = sorted(set(adapter.modules) ^ set(first.modules))[0]
            raise AdapterError(
                f"{adapter.folder} and {first.folder} must adapt the same modules, {odd} is in one; train both alike"
            )
        if adapter.base_model != first.base_model:
            raise AdapterError(
                f"{adapter.folder / CONFIG_FILE}: base_model_name_or_path must be {first.base_model!r} as in {first.folder}, "
                f"got {adapter.base_model!r}; merge experts of one base"
            )
        stored = _read_shapes(adapter.folder)
        for module in adapter.modules:
            shape = (stored[_key(module, "B")][0], stored[_key(module, "A")][1])
            if shapes.setdefault(module, shape) != shape:
                raise AdapterError(
                    f"{adapter.folder / WEIGHTS_FILE}: {module} must be {shapes[module]} as in {first.folder}, got {shape}; "
                    "merge experts of one base"
                )
    return shapes


def write_adapter(
    folder: Path,
    factors: Iterable[LoraFactors],
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    base_model: str | None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write factors as a PEFT adapter of one `rank` with alpha = rank: each scale is folded into B, zeros fill up lower ranks.

    `shapes` maps each module to (O, I) and gives the order in which `factors` come.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(shapes), inference_mode=True,
        base_model_name_or_path=base_model, revision=revision,
    )  # fmt: skip
    config.save_pretrained(folder)
    specs = []
    for module, (rows, columns) in shapes.items():
        specs += [
            TensorSpec(_key(module, "A"), dtype, (rank, columns)),
            TensorSpec(_key(module, "B"), dtype, (rows, rank)),
        ]
    write_safetensors(folder / WEIGHTS_FILE, specs, _plain_tensors(factors, rank))


def _plain_tensors(factors: Iterable[LoraFactors], rank: int) -> Iterator[torch.Tensor]:
    for module in factors:
        missing = rank - module.rank
        assert missing >= 0, (module.module, module.rank, rank)
        yield torch.nn.functional.pad(module.A_RI, (0, 0, 0, missing))
        yield torch.nn.functional.pad(module.scale * module.B_OR.float(), (0, missing))


def _key(module: str, side: str) -> str:
    return f"{_PREFIX}{module}.lora_{side}.weight"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist; name a folder in PEFT's format, or train this expert") from None
    except ValueError as error:
        raise AdapterError(f"{path} must be JSON ({error}); export the adapter again") from None
    for key, allowed in _PLAIN_SETTINGS.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise AdapterError(
                f"{path}: {key} must be {allowed[0]!r} to be merged, got {value!r}; export a plain LoRA adapter"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASES):
        raise AdapterError(
            f"{path}: init_lora_weights={start!r} changes the base model; convert to a plain LoRA adapter first"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise AdapterError(
                f"{path}: {key} must be a positive number, got {config.get(key)!r}; export the adapter again"
            )
    return config


def _scale(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [found.name for found in sorted(folder.iterdir()) if found.suffix in _PICKLES]
        if pickles:
            raise AdapterError(
                f"{folder / pickles[0]} is a pickle, which is never opened; save the adapter as {WEIGHTS_FILE}"
            )
        raise AdapterError(f"{path} does not exist; train this expert or copy its weights there")
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}); it is truncated or no safetensors file, export it again"
        ) from None
    if not shapes:
        raise AdapterError(f"{path} holds no tensors; train this expert again")
    return shapes


def _check_shapes(path: Path, module: str, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    expected = [_key(module, side) for side in "AB"]
    for key in shapes:
        if key.startswith(f"{_PREFIX}{module}.lora_") and key not in expected:
            raise AdapterError(
                f"{path}: {key} is no weight of a plain linear LoRA; export a LoRA of linear layers alone"
            )
    for key in expected:
        if key not in shapes:
            raise AdapterError(f"{path}: {key} is missing; export the adapter in PEFT's format with both factors")
    A_shape, B_shape = (shapes[key] for key in expected)
    if len(A_shape) != 2 or len(B_shape) != 2 or A_shape[0] != rank or B_shape[1] != rank:
        raise AdapterError(
            f"{path}: {module} must have factors ({rank}, I) and (O, {rank}) as r={rank} says, "
            f"got {A_shape} and {B_shape}; export a LoRA of linear layers of one rank"
        )
