"""LoRAs of other programs brought into PEFT's format: diffusers' files, kohya's and A1111's, original formats of FLUX and Qwen-Image.

What diffusers' own readers rename is renamed by them; what they would drop in silence is refused here.

Shapes: I input features, O output features, R rank.
"""

import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from selma_ray.adapters.files import CONFIG_FILE
from selma_ray.adapters.peft_format import (
    LoraFactors,
    Shape,
    checked_settings,
    lora_scale,
    open_adapter,
    unreadable,
    write_adapter,
)
from selma_ray.adapters.targets import adaptable_shapes
from selma_ray.adapters.text_encoders import encoder_shapes, is_told, part_of, plain_name, text_parts
from selma_ray.errors import AdapterError, first_line
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family, pipeline_class_of
from selma_ray.models.published import configured

__all__ = ["Adapted", "Parts", "adapted", "described", "import_adapter", "read_lora", "read_parts"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = {
    "DoRA, whose weights are scaled column by column, which no sum of deltas keeps": re.compile(
        r"dora_scale|lora_magnitude_vector"
    ),
    "LyCORIS (LoHa, LoKr, OFT, GLoRA, a full difference or a Tucker kernel), whose delta is no product of two factors": re.compile(
        r"hada_|lokr_|oft_|lora_mid|\.(a1|a2|b1|b2)\.weight$|\.diff(_b)?$"
    ),
}
_SIDE = re.compile(
    r"(?P<module>.+?)(?:\.lora_A(?:\.default)?\.weight|\.lora_down\.weight|\.lora(?:_linear_layer)?\.down\.weight)$|"
    r"(?P<up>.+?)(?:\.lora_B(?:\.default)?\.weight|\.lora_up\.weight|\.lora(?:_linear_layer)?\.up\.weight)$|"
    r"(?P<scaled>.+?)\.alpha$"
)


@dataclass(frozen=True)
class Adapted:
    """The denoiser that a LoRA is for, by which its names and shapes are known, and the text encoders that it may adapt too."""

    model_name: str
    part: str
    """What its pipeline calls it: unet or transformer."""
    pipeline_class: str
    config: Any
    shapes: Mapping[str, Shape]
    encoders: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)
    """Shapes of each text encoder's modules, by what the pipeline calls it; none where such parts are not applied."""


Parts = dict[str, dict[str, LoraFactors]]
"""Factors by module, of each part of a pipeline by its name there."""


def adapted(denoiser: Any, pipeline_class: str, model_name: str) -> Adapted:
    """Describe a denoiser, which may be on the meta device."""
    part = "unet" if isinstance(denoiser, diffusers.UNet2DConditionModel) else "transformer"
    return Adapted(model_name, part, pipeline_class, denoiser.config, adaptable_shapes(denoiser))


def read_lora(source: Path, name: str, denoiser: Adapted, *, skip_text_encoders: bool) -> dict[str, LoraFactors]:
    """Return the factors of a LoRA by module, in fp32.

    As `read_parts`, of which it returns the denoiser's.
    """
    return read_parts(source, name, denoiser, skip_text_encoders=skip_text_encoders)[denoiser.part]


def read_parts(source: Path, name: str, denoiser: Adapted, *, skip_text_encoders: bool) -> Parts:
    """Return the factors of a LoRA by part and module, in fp32: of the denoiser, and of the text encoders that it adapts.

    `source` is a LoRA file, a folder with one, an adapter's folder, or a run's folder, whose expert or merge `name` is meant. What it
    has for text encoders that are not known is refused, and all of it is left out with a warning where `skip_text_encoders` says so.
    Raises AdapterError, naming file, key and remedy, for what is no LoRA of this model.
    """
    place = _found(source, name)
    return (_read_folder if place.is_dir() else _read_file)(place, denoiser, skip_text_encoders)


def import_adapter(source: Path, name: str, target: Path, model: ModelConfig, skip_text_encoders: bool = False) -> None:
    """Write a LoRA from anywhere, as `read_parts` takes it, as an adapter's folder of `model`; zeros fill up lower ranks."""
    denoiser = described(model)
    parts = read_parts(source, name, denoiser, skip_text_encoders=skip_text_encoders)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        for of_part, factors in parts.items():
            known = denoiser.encoders.get(of_part, denoiser.shapes)
            shapes = {module: known[module] for module in sorted(factors)}
            folder = part if of_part == denoiser.part else part / of_part
            rank = max(each.rank for each in factors.values())
            write_adapter(folder, (factors[module] for module in shapes), shapes, rank, model.name)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _found(source: Path, name: str) -> Path:
    """Return the adapter's folder or the file that a path means."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise AdapterError(f"{source} does not exist; name a LoRA file, an adapter's folder or a run's")
    candidates = (source, source / "experts" / name, source / "merged" / name / "adapter", source / "adapter")
    for candidate in candidates:
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        raise AdapterError(
            f"{source} must hold {CONFIG_FILE}, experts/{name} or one .safetensors file, holds {len(files)} of them; name the file itself"
        )
    return files[0]


def described(model: ModelConfig) -> Adapted:
    """Describe a model's denoiser and CLIP text encoders by their configurations alone."""
    with configured(model) as known, torch.device("meta"):
        family: Any = open_family(known)
        denoiser = adapted(family.empty_denoiser(), pipeline_class_of(known, family.located), model.name)
        return replace(denoiser, encoders=encoder_shapes(known))


def _read_folder(folder: Path, denoiser: Adapted, skip_text_encoders: bool) -> Parts:
    factors = {each.module: each for each in open_adapter(folder)}
    _check_modules(folder, factors, denoiser)
    parts = {denoiser.part: factors}
    for part in [] if skip_text_encoders else text_parts(folder):
        if part not in denoiser.encoders:
            raise AdapterError(_unknown_encoder(folder, part, denoiser))
        encoder = replace(denoiser, part=part, shapes=denoiser.encoders[part])
        named = {plain_name(each.module, encoder.shapes): each for each in open_adapter(folder / part)}
        parts[part] = {module: replace(each, module=module) for module, each in named.items()}
        _check_modules(folder / part, parts[part], encoder)
    return parts


def _read_file(path: Path, denoiser: Adapted, skip_text_encoders: bool) -> Parts:
    tensors, settings = _loaded(path), _settings(path, denoiser)
    _refuse_other_kinds(path, tensors)
    told = {key: tensors.pop(key) for key in [*filter(is_told, tensors)]}
    if told and skip_text_encoders:
        logger.warning("%s: what it has for text encoders is left out, the %s alone is adapted", path, denoiser.part)
    if not tensors:
        raise AdapterError(f"{path} holds nothing for the {denoiser.part} of {denoiser.model_name}; name another file")
    _check_finite(path, tensors | told)
    named = _named(tensors, denoiser)
    if not all(module in denoiser.shapes for module, _ in named):
        named = _named(_renamed(path, tensors, denoiser), denoiser)
    parts = {denoiser.part: _factors(path, named, denoiser, settings)}
    return parts if skip_text_encoders else parts | _text_factors(path, told, denoiser)


def _text_factors(path: Path, told: Mapping[str, torch.Tensor], denoiser: Adapted) -> Parts:
    by_part: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in told.items():
        part, rest = part_of(key)
        if part is None or part not in denoiser.encoders:
            raise AdapterError(_unknown_encoder(path, key, denoiser))
        by_part.setdefault(part, {})[rest] = tensor
    parts: Parts = {}
    for part, tensors in by_part.items():
        encoder = replace(denoiser, part=part, shapes=denoiser.encoders[part])
        sides = {
            (plain_name(module, encoder.shapes), side): tensor
            for (module, side), tensor in _named(tensors, encoder).items()
        }
        parts[part] = _factors(path, sides, encoder, _settings(path, encoder))
    return parts


def _unknown_encoder(path: Path, key: str, denoiser: Adapted) -> str:
    return (
        f"{path}: {key} is of a text encoder, which is merged for CLIP alone and not for {denoiser.model_name}; set "
        "merging.skip_text_encoders=true to merge the rest, or export the LoRA without it"
    )


def _settings(path: Path, denoiser: Adapted) -> Mapping[str, Any]:
    """Return what diffusers wrote of PEFT's settings into a file's header, which its names do not tell; nothing where it did not."""
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    prefix = f"{denoiser.part}."
    settings = {key.removeprefix(prefix): value for key, value in written.items() if key.startswith(prefix)}
    return checked_settings(path, settings) if settings else {}


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path} must be a .safetensors file; others may run code when opened, save it as one")
    try:
        # What 8-bit floats cannot be multiplied in, and what half precision rounds.
        return {key: tensor.float() for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(unreadable(path, error)) from None


def _refuse_other_kinds(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for kind, pattern in _UNSUPPORTED.items():
        found = next((key for key in tensors if pattern.search(key)), None)
        if found:
            raise AdapterError(f"{path}: {found} is of {kind}; merge plain LoRAs")


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {key} must be finite, holds NaN or infinity; export the LoRA again")
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise AdapterError(
                f"{path}: {key} must be one number, has shape {tuple(tensor.shape)}; export the LoRA again"
            )


def _named(tensors: Mapping[str, torch.Tensor], denoiser: Adapted) -> dict[tuple[str, str], torch.Tensor]:
    """Return tensors by module and side (A, B or alpha); what is no name of a LoRA keeps its own, with no side."""
    by_kohya = {module.replace(".", "_"): module for module in denoiser.shapes}
    named = {}
    for key, tensor in tensors.items():
        match = _SIDE.match(key)
        if match is None:
            named[key, ""] = tensor
            continue
        side = "A" if match["module"] else "B" if match["up"] else "alpha"
        module = match["module"] or match["up"] or match["scaled"]
        for prefix in (
            f"{denoiser.part}.",
            "base_model.model.",
            "diffusion_model.",
            f"lora_{denoiser.part}_",
            "lora_unet_",
        ):
            if module.startswith(prefix):
                module = module.removeprefix(prefix)
                break
        named[by_kohya.get(module, module), side] = tensor
    return named


def _renamed(path: Path, tensors: Mapping[str, torch.Tensor], denoiser: Adapted) -> dict[str, torch.Tensor]:
    """Return the tensors as diffusers' reader of the family names them, with alphas beside them."""
    reader = getattr(diffusers, denoiser.pipeline_class)
    options = {"unet_config": denoiser.config} if denoiser.part == "unet" else {}
    alphas: Mapping[str, Any] = {}
    try:
        read = reader.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, **options)
        if isinstance(read, tuple):
            read, alphas = read[0], read[1] or {}
        if denoiser.part == "unet":
            read = convert_unet_state_dict_to_peft(read)
    except Exception as error:  # each reader fails in its own way on names that it does not know
        raise AdapterError(
            f"{path}: {next(iter(tensors))} and others are no names of a LoRA for {denoiser.model_name} ({first_line(error)}); "
            "name a LoRA of this model"
        ) from None
    alphas = convert_unet_state_dict_to_peft(alphas)
    scales = {
        re.sub(r"(\.lora_A\.weight)?\.alpha$", ".alpha", key): torch.as_tensor(alpha, dtype=torch.float32)
        for key, alpha in alphas.items()
    }
    return {**read, **scales}


def _factors(
    path: Path, named: Mapping[tuple[str, str], torch.Tensor], denoiser: Adapted, settings: Mapping[str, Any]
) -> dict[str, LoraFactors]:
    modules = sorted({module for module, _ in named})
    unknown = [module for module in modules if module not in denoiser.shapes]
    if unknown:
        others = "none of its names is" if len(unknown) == len(modules) else "others are"
        raise AdapterError(
            f"{path}: {unknown[0]} is no module of {denoiser.model_name} that can be adapted, {others}; name a LoRA of this model"
        )
    return {module: _module_factors(path, module, named, denoiser.shapes[module], settings) for module in modules}


def _module_factors(
    path: Path,
    module: str,
    named: Mapping[tuple[str, str], torch.Tensor],
    shape: Shape,
    settings: Mapping[str, Any],
) -> LoraFactors:
    A, B, alpha = (named.get((module, side)) for side in ("A", "B", "alpha"))
    if A is None or B is None:
        raise AdapterError(
            f"{path}: {module} must have both factors, {'the second' if B is None else 'the first'} is missing; export the LoRA again"
        )
    rank, inputs = len(A), math.prod(shape[1:])
    if A.numel() != rank * inputs or B.numel() != shape[0] * rank or len(B) != shape[0]:
        raise AdapterError(
            f"{path}: {module} must have factors of a weight of shape {shape}, got {tuple(A.shape)} and {tuple(B.shape)}; "
            "name a LoRA of this model"
        )
    written = lora_scale(settings, module, rank) if settings else 1.0
    scale = written if alpha is None else float(alpha) / rank
    return LoraFactors(module, A.reshape(rank, inputs), B.reshape(shape[0], rank), scale)


def _check_modules(folder: Path, factors: Mapping[str, LoraFactors], denoiser: Adapted) -> None:
    for module, each in factors.items():
        shape = denoiser.shapes.get(module)
        if shape is None or (len(each.B_OR), each.A_RI.shape[1]) != (shape[0], math.prod(shape[1:])):
            raise AdapterError(
                f"{folder}: {module} must be a module of {denoiser.model_name} that can be adapted, of shape "
                f"{'none' if shape is None else shape}; name a LoRA of this model"
            )
