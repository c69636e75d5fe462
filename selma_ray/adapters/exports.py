"""A merged adapter as single files that other programs load: diffusers' `load_lora_weights`, and kohya's names for ComfyUI and A1111.

Shapes: I input features, O output features, R rank.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from selma_ray.adapters.peft_format import Adapter, Shape, factor_shapes
from selma_ray.adapters.streaming import TensorSpec, write_safetensors
from selma_ray.errors import AdapterError

__all__ = ["EXPORT_FILES", "write_diffusers", "write_kohya"]

_VERSIONS = {
    768: {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    2048: {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
EXPORT_FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}


def write_diffusers(
    path: Path,
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    denoiser: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `adapter` as the one file that a pipeline's `load_lora_weights` reads; `denoiser` is unet or transformer.

    `shapes` maps each module to its weight's, `metadata` goes into the file's header. Scales are folded into B, as diffusers takes
    alpha to be the rank. Raises AdapterError where a value is too large for `dtype`.
    """
    specs = []
    modules = [module for module in shapes if module in adapter.shapes]
    for module in modules:
        A_shape, B_shape = factor_shapes(shapes[module], adapter.ranks[module])
        specs += [
            TensorSpec(f"{denoiser}.{module}.lora_A.weight", dtype, A_shape),
            TensorSpec(f"{denoiser}.{module}.lora_B.weight", dtype, B_shape),
        ]
    factors = map(adapter.factors, modules)
    tensors = (tensor for each in factors for tensor in (each.A_RI, each.scale * each.B_OR))
    write_safetensors(path, specs, tensors, metadata)


def write_kohya(
    path: Path,
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a UNet's `adapter` under kohya's names, each module with its alpha.

    Modules keep diffusers' names (`lora_unet_down_blocks_0_…`), which ComfyUI, A1111 and diffusers map to theirs. alpha says the
    scale: without it some programs take 1, others 1 / R. Raises AdapterError where two modules would bear one name, or a value is too
    large for `dtype`.
    """
    specs = []
    owners: dict[str, str] = {}
    modules = [module for module in shapes if module in adapter.shapes]
    for module in modules:
        name = f"lora_unet_{module.replace('.', '_')}"
        if owners.setdefault(name, module) != module:
            raise AdapterError(
                f"{adapter.folder}: {owners[name]} and {module} are both {name} to kohya; leave kohya out of merging.exports"
            )
        A_shape, B_shape = factor_shapes(shapes[module], adapter.ranks[module])
        specs += [
            TensorSpec(f"{name}.lora_down.weight", dtype, A_shape),
            TensorSpec(f"{name}.lora_up.weight", dtype, B_shape),
            TensorSpec(f"{name}.alpha", torch.float32, ()),
        ]
    factors = map(adapter.factors, modules)
    tensors = (tensor for each in factors for tensor in (each.A_RI, each.B_OR, torch.tensor(each.scale * each.rank)))
    largest = max(modules, key=adapter.ranks.__getitem__)
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": f"{adapter.scales[largest] * adapter.rank:g}",
        "ss_sd_model_name": adapter.base_model or "",
    }
    write_safetensors(path, specs, tensors, {**metadata, **described, **_version(shapes)})


def _version(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return which Stable Diffusion a UNet is, by the width of its texts: A1111 hides a file that does not say so beside another."""
    widths = {shape[1] for module, shape in shapes.items() if module.endswith(("attn2.to_k", "attn2.to_v"))}
    return next((dict(said) for width, said in _VERSIONS.items() if widths == {width}), {})
