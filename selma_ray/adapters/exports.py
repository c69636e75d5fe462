"""A merged adapter as single files that other programs load: diffusers' `load_lora_weights`, kohya's names and ComfyUI's.

Shapes: I input features, O output features, R rank.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from selma_ray.adapters.comfyui import COMFYUI_FAMILIES, UnknownNameError, write_comfyui
from selma_ray.adapters.foreign import Adapted
from selma_ray.adapters.peft_format import Adapter, Shape, factor_shapes, open_adapter
from selma_ray.adapters.streaming import TensorSpec, write_safetensors
from selma_ray.adapters.text_encoders import kohya_prefixes, text_parts, written_name
from selma_ray.errors import AdapterError

__all__ = ["EXPORT_FILES", "ExportName", "write_diffusers", "write_export", "write_kohya"]

logger = logging.getLogger(__name__)

ExportName = Literal["diffusers", "kohya", "comfyui"]

# By the width of their texts: kohya's name, whether it is a second version, and the name and size of Stability's model specification.
_VERSIONS = {
    768: ("sd_v1", "False", "stable-diffusion-v1", "512x512"),
    1024: ("sd_v2", "True", "stable-diffusion-v2-512", "512x512"),
    2048: ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base", "1024x1024"),
}
_MODEL_HASH, _LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_LEGACY_PART = 0x100000, 0x10000  # where the older hash begins, and how many bytes it is of
EXPORT_FILES: Mapping[ExportName, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "kohya.safetensors",
    "comfyui": "comfyui.safetensors",
}


def write_export(
    name: ExportName,
    folder: Path,
    adapter: Adapter,
    model: Adapted,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Write a file of EXPORT_FILES into a folder; False, and nothing is written, where that format is not of the model's kind.

    UNets have kohya's names, which ComfyUI reads too; FLUX, FLUX.2, Qwen-Image and Z-Image have ComfyUI's.
    """
    path, encoders = folder / EXPORT_FILES[name], _text_encoders_of(adapter)
    if name == "diffusers":
        write_diffusers(path, adapter, adapter.shapes, model.part, metadata, dtype, encoders)
    elif name == "kohya" and model.part == "unet":
        two = "text_encoder_2" in model.encoders
        write_kohya(path, adapter, adapter.shapes, metadata, dtype, encoders, numbered=two)
    elif name == "comfyui" and model.pipeline_class in COMFYUI_FAMILIES:
        try:
            write_comfyui(path, adapter, model.shapes, model.pipeline_class, metadata, dtype)
        except UnknownNameError as unknown:
            logger.warning("merging.exports: comfyui is not written, %s has no name there", unknown)
            return False
    else:
        return False
    return True


def _text_encoders_of(adapter: Adapter) -> dict[str, Adapter]:
    """Return an adapter's parts for text encoders, by what the pipeline calls them."""
    return {part: open_adapter(adapter.folder / part) for part in text_parts(adapter.folder)}


@dataclass(frozen=True)
class _Written:
    """A module as a file has it."""

    name: str
    adapter: Adapter
    module: str

    @property
    def stored(self) -> tuple[Shape, Shape]:
        """Return the shapes of A and B."""
        return factor_shapes(self.adapter.shapes[self.module], self.adapter.ranks[self.module])


def write_diffusers(
    path: Path,
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    denoiser: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    encoders: Mapping[str, Adapter] | None = None,
) -> None:
    """Write `adapter` as the one file that a pipeline's `load_lora_weights` reads; `denoiser` is unet or transformer.

    `encoders` are its parts for text encoders. `shapes` maps each module to its weight's, `metadata` goes into the file's header. Scales
    are folded into B, as diffusers takes alpha to be the rank. Raises AdapterError where a value is too large for `dtype`.
    """
    written = [_Written(f"{denoiser}.{module}", adapter, module) for module in shapes if module in adapter.shapes]
    for part, encoder in (encoders or {}).items():
        written += [_Written(f"{part}.{written_name(module)}", encoder, module) for module in encoder.modules]
    specs = []
    for each in written:
        for side, stored in zip("AB", each.stored, strict=True):
            specs.append(TensorSpec(f"{each.name}.lora_{side}.weight", dtype, stored))
    write_safetensors(path, specs, _folded(written), metadata)


def _folded(written: list[_Written]) -> Iterator[torch.Tensor]:
    for each in written:
        factors = each.adapter.factors(each.module)
        yield factors.A_RI
        yield factors.scale * factors.B_OR


def write_kohya(
    path: Path,
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    encoders: Mapping[str, Adapter] | None = None,
    *,
    numbered: bool = False,
) -> None:
    """Write a UNet's `adapter` under kohya's names, each module with its alpha.

    `encoders` are its parts for text encoders, `numbered` where the model has two of them.

    Modules keep diffusers' names (`lora_unet_down_blocks_0_…`), which ComfyUI, A1111 and diffusers map to theirs. alpha says the
    scale: without it some programs take 1, others 1 / R. Raises AdapterError where two modules would bear one name, or a value is too
    large for `dtype`.
    """
    modules = [module for module in shapes if module in adapter.shapes]
    written = [_Written(f"lora_unet_{module.replace('.', '_')}", adapter, module) for module in modules]
    prefixes = kohya_prefixes(encoders or {}, two=numbered)
    for part, encoder in (encoders or {}).items():
        written += [
            _Written(f"{prefixes[part]}_{written_name(module).replace('.', '_')}", encoder, module)
            for module in encoder.modules
        ]
    specs = []
    owners: dict[str, str] = {}
    for each in written:
        if owners.setdefault(each.name, each.module) != each.module:
            raise AdapterError(
                f"{adapter.folder}: {owners[each.name]} and {each.module} are both {each.name} to kohya; leave kohya out of merging.exports"
            )
        A_shape, B_shape = each.stored
        specs += [
            TensorSpec(f"{each.name}.lora_down.weight", dtype, A_shape),
            TensorSpec(f"{each.name}.lora_up.weight", dtype, B_shape),
            TensorSpec(f"{each.name}.alpha", torch.float32, ()),
        ]
    factors = (each.adapter.factors(each.module) for each in written)
    tensors = (tensor for each in factors for tensor in (each.A_RI, each.B_OR, torch.tensor(each.scale * each.rank)))
    largest = max(modules, key=adapter.ranks.__getitem__)
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": f"{adapter.scales[largest] * adapter.rank:g}",
        "ss_sd_model_name": adapter.base_model or "",
    }
    hashes = {_MODEL_HASH: "0" * 64, _LEGACY_HASH: "0" * 8}
    write_safetensors(path, specs, tensors, {**metadata, **described, **_version(shapes, path), **hashes})
    _fill_in_hashes(path)


def _version(shapes: Mapping[str, Shape], path: Path) -> dict[str, str]:
    """Return which Stable Diffusion a UNet is, by the width of its texts: A1111 hides a file that does not say so beside another."""
    widths = {shape[1] for module, shape in shapes.items() if module.endswith(("attn2.to_k", "attn2.to_v"))}
    width = next((width for width in _VERSIONS if widths == {width}), None)
    if width is None:
        return {}
    version, is_second, architecture, resolution = _VERSIONS[width]
    return {
        "ss_base_model_version": version,
        "ss_v2": is_second,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": path.stem,
        "modelspec.resolution": resolution,
    }


def _fill_in_hashes(path: Path) -> None:
    """Put the hashes that kohya's tools know a LoRA by into a file's header: of all tensors, and of a part of the file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        model_hash = hashlib.file_digest(file, "sha256").hexdigest()
        start, count = _LEGACY_PART
        file.seek(start)
        legacy_hash = hashlib.sha256(file.read(count)).hexdigest()[:8]
        for name, found in ((_MODEL_HASH, model_hash), (_LEGACY_HASH, legacy_hash)):
            empty = f'"{name}":"' + "0" * len(found)
            header = header.replace(empty.encode(), f'"{name}":"{found}'.encode())
        file.seek(8)
        file.write(header)
