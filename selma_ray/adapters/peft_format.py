"""Reading and writing LoRA adapters in PEFT's folder format, strictly and one module at a time.

Shapes: I input features, O output features, R rank. The delta of a module is scale * B_OR @ A_RI; of a convolution, I counts its kernel's
entries too, as in its weight's (O, I, kh, kw) laid out in two dimensions.
"""

import json
import math
import re
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
from selma_ray.errors import AdapterError, first_line

__all__ = [
    "Adapter",
    "LoraFactors",
    "Shape",
    "checked_settings",
    "factor_shapes",
    "lora_scale",
    "open_adapter",
    "shapes_of",
    "unreadable",
    "write_adapter",
]

Shape = tuple[int, ...]
"""Of a weight: (O, I) of a linear module, (O, I, kh, kw) of a convolution."""

_PREFIX = "base_model.model."
_LFS = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Settings that change what a delta is, each with the values under which it is scale * B @ A.
_PLAIN_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": ([], None),
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
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
        """Return weight + delta in float32, in the weight's shape and in one pass over it."""
        flat_OI = weight_OI.flatten(1).float()
        return torch.addmm(flat_OI, self.B_OR.float(), self.A_RI.float(), alpha=self.scale).view(weight_OI.shape)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose configuration and tensor names are checked; tensors are read as they are asked for."""

    folder: Path
    base_model: str | None
    shapes: Mapping[str, Shape]
    """Shape of each adapted module's weight."""
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    revision: str | None = None
    """Revision of the base model that it was fitted to, where the adapter says so."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the adapted modules, sorted."""
        return tuple(self.shapes)

    @property
    def rank(self) -> int:
        """Return the largest rank."""
        return max(self.ranks.values(), default=1)

    @cached_property
    def _tensors(self) -> Any:
        return safe_open(self.folder / WEIGHTS_FILE, framework="pt")

    def factors(self, module: str) -> LoraFactors:
        """Read one module in float32, whatever the file's precision; raises AdapterError where a tensor is not finite."""
        A_RI, B_OR = (self._tensors.get_tensor(_key(module, side)).float().flatten(1) for side in "AB")
        for side, tensor in (("A", A_RI), ("B", B_OR)):
            # The sum is not finite where an entry is not, and reads the tensor once, where isfinite would write another.
            if not math.isfinite(tensor.sum(dtype=torch.float64)):
                raise AdapterError(
                    f"{self.folder / WEIGHTS_FILE}: {_key(module, side)} must be finite, holds NaN or infinity; train this expert again"
                )
        return LoraFactors(module, A_RI, B_OR, self.scales[module], self.folder.name)

    def factors_or_zero(self, module: str, shape: Shape) -> LoraFactors:
        """Read one module, or return a delta of zero for one that the adapter leaves as it is; `shape` is its weight's."""
        if module in self.shapes:
            return self.factors(module)
        A_RI, B_OR = torch.zeros(1, math.prod(shape[1:])), torch.zeros(shape[0], 1)
        return LoraFactors(module, A_RI, B_OR, 1.0, self.folder.name)

    def __iter__(self) -> Iterator[LoraFactors]:
        return map(self.factors, self.modules)


def open_adapter(folder: str | Path) -> Adapter:
    """Open an adapter folder (a path, or a URI); raises AdapterError, naming file, key and remedy, where it is no plain LoRA adapter."""
    folder = local_adapter(folder)
    config = _read_config(folder)
    stored = _read_shapes(folder)
    modules = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in stored})
    ranks = {module: int(_of_module(config, "rank_pattern", "r", module)) for module in modules}
    for module in modules:
        _check_shapes(folder / WEIGHTS_FILE, module, stored, ranks[module])
    shapes = {
        module: (stored[_key(module, "B")][0], *stored[_key(module, "A")][1:])  # a kernel is A's
        for module in modules
    }
    scales = {module: lora_scale(config, module, ranks[module]) for module in modules}
    return Adapter(folder, config.get("base_model_name_or_path"), shapes, ranks, scales, config.get("revision"))


def shapes_of(adapters: Sequence[Adapter], *, alike: bool = True) -> dict[str, Shape]:
    """Return the shape of every module's weight, of all adapters; raises AdapterError where they differ in shapes or base model.

    Where they have to be `alike`, they also have the same modules.
    """
    first = adapters[0]
    shapes: dict[str, Shape] = {}
    owners: dict[str, Path] = {}
    for adapter in adapters:
        if alike and adapter.modules != first.modules:
            odd = sorted(set(adapter.modules) ^ set(first.modules))[0]
            raise AdapterError(
                f"{adapter.folder} and {first.folder} must adapt the same modules, {odd} is in one; train both alike"
            )
        if adapter.base_model != first.base_model:
            raise AdapterError(
                f"{adapter.folder / CONFIG_FILE}: base_model_name_or_path must be {first.base_model!r} as in {first.folder}, "
                f"got {adapter.base_model!r}; merge experts of one base"
            )
        for module, shape in adapter.shapes.items():
            owner = owners.setdefault(module, adapter.folder)
            if shapes.setdefault(module, shape) != shape:
                raise AdapterError(
                    f"{adapter.folder / WEIGHTS_FILE}: {module} must be {shapes[module]} as in {owner}, got {shape}; "
                    "merge experts of one base"
                )
    return dict(sorted(shapes.items()))


def factor_shapes(shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Return in which shapes PEFT and kohya store A and B of a weight: a convolution's B is one of 1 x 1."""
    return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))


def write_adapter(
    folder: Path,
    factors: Iterable[LoraFactors],
    shapes: Mapping[str, Shape],
    rank: int,
    base_model: str | None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write factors as a PEFT adapter of one `rank` with alpha = rank: each scale is folded into B, zeros fill up lower ranks.

    `shapes` maps each module to its weight's and gives the order in which `factors` come.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(shapes), inference_mode=True,
        base_model_name_or_path=base_model, revision=revision,
    )  # fmt: skip
    config.save_pretrained(folder)
    specs = []
    for module, shape in shapes.items():
        for side, stored in zip("AB", factor_shapes(shape, rank), strict=True):
            specs.append(TensorSpec(_key(module, side), dtype, stored))
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
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must be a mapping, is a {type(config).__name__}; export the adapter again")
    return checked_settings(path, config)


def checked_settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's settings of a LoRA; raises AdapterError for those under which a delta is not scale * B @ A, and for bad numbers."""
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
    for pattern in _PATTERNS:
        if not isinstance(config.get(pattern) or {}, dict):
            raise AdapterError(
                f"{path}: {pattern} must be a mapping, got {config[pattern]!r}; export the adapter again"
            )
        for name, value in (config.get(pattern) or {}).items():
            _check_positive(path, f"{pattern} of {name}", value)
    for key in ("r", "lora_alpha"):
        _check_positive(path, key, config.get(key))
    return config


def _check_positive(path: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise AdapterError(f"{path}: {key} must be a positive number, got {value!r}; export the adapter again")


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r of a module by PEFT's settings, or alpha / sqrt(r) of a rank-stabilised LoRA (2312.03732, section 4)."""
    alpha = float(_of_module(config, "alpha_pattern", "lora_alpha", module))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], pattern: str, otherwise: str, module: str) -> Any:
    """Return what a pattern has for a module, by the rule of PEFT: the first key that is the end of its name, as an expression."""
    for name, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({name})$", module):
            return value
    return config[otherwise]


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
        raise AdapterError(unreadable(path, error)) from None
    if not shapes:
        raise AdapterError(f"{path} holds no tensors; train this expert again")
    return shapes


def unreadable(path: Path, error: Exception) -> str:
    """Return why a safetensors file cannot be read, in one line: what Git LFS leaves in a file's place, or a broken one."""
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            return f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` where it came from"
    return f"{path} cannot be read ({first_line(error)}); it is truncated or no safetensors file, export it again"


def _check_shapes(path: Path, module: str, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    expected = [_key(module, side) for side in "AB"]
    for key in shapes:
        if key.startswith(f"{_PREFIX}{module}.lora_") and key not in expected:
            raise AdapterError(
                f"{path}: {key} is no weight of a plain LoRA; export a LoRA of linear layers and convolutions alone"
            )
    for key in expected:
        if key not in shapes:
            raise AdapterError(f"{path}: {key} is missing; export the adapter in PEFT's format with both factors")
    A_shape, B_shape = (shapes[key] for key in expected)
    expected_shapes = factor_shapes((B_shape[0], *A_shape[1:]), rank) if A_shape and B_shape else None
    if len(A_shape) not in (2, 4) or (A_shape, B_shape) != expected_shapes:
        raise AdapterError(
            f"{path}: {module} must have factors ({rank}, I) and (O, {rank}) as r={rank} says, or (…, kh, kw) and (…, 1, 1), "
            f"got {A_shape} and {B_shape}; export a LoRA of linear layers and convolutions whose ranks are in adapter_config.json"
        )
