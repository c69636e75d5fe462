"""LoRA files of transformers by the names that ComfyUI knows: those of the original formats, or diffusers' where it takes them.

FLUX and FLUX.2 have one projection for query, key and value there: the factors of the parts stand in it side by side, those of A one above
the other and those of B as blocks, so that the delta is the same to the bit.

Shapes: I input features, O output features, R rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from selma_ray.adapters.peft_format import Adapter, LoraFactors, Shape, factor_shapes
from selma_ray.adapters.streaming import TensorSpec, write_safetensors

__all__ = ["COMFYUI_FAMILIES", "UnknownNameError", "write_comfyui"]

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_ATTENTION = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_FLUX_DOUBLE = {
    **_ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX2_DOUBLE = {
    **_ATTENTION,
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_FLUX2_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_BLOCK = re.compile(r"(?P<kind>(single_)?transformer_blocks)\.(?P<number>\d+)\.(?P<inside>.+)")


@dataclass(frozen=True)
class _Format:
    """How a family's file names modules; without blocks they keep diffusers' names."""

    prefix: str
    underscores: bool = False
    """kohya's way: modules in underscores, lora_down and lora_up, and an alpha."""
    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] | None = None


COMFYUI_FAMILIES: Mapping[str, _Format] = {
    "FluxPipeline": _Format(
        "lora_unet_",
        underscores=True,
        blocks={
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
    ),
    "Flux2KleinPipeline": _Format(
        "diffusion_model.",
        blocks={
            "transformer_blocks": ("double_blocks", _FLUX2_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX2_SINGLE),
        },
    ),
    "QwenImagePipeline": _Format("diffusion_model."),
    "ZImagePipeline": _Format("diffusion_model."),
}
"""By the class of the pipeline."""


class UnknownNameError(Exception):
    """A module has no name in the format; the message is the module."""


def write_comfyui(
    path: Path,
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    pipeline_class: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a transformer's `adapter` as a file that ComfyUI loads, and diffusers; `pipeline_class` is one of COMFYUI_FAMILIES.

    `shapes` maps every module of the transformer that could be adapted to its weight's. Scales are folded into B. Raises
    UnknownNameError for a module that the format has no name for, AdapterError where a value is too large for `dtype`.
    """
    written = COMFYUI_FAMILIES[pipeline_class]
    groups = _groups(adapter, written)
    down, up = ("lora_down", "lora_up") if written.underscores else ("lora_A", "lora_B")
    specs = []
    for name, parts in groups.items():
        A_shape, B_shape = _shapes_of(adapter, parts, shapes)
        key = written.prefix + (name.replace(".", "_") if written.underscores else name)
        specs += [TensorSpec(f"{key}.{down}.weight", dtype, A_shape), TensorSpec(f"{key}.{up}.weight", dtype, B_shape)]
        if written.underscores:
            specs.append(TensorSpec(f"{key}.alpha", torch.float32, ()))
    write_safetensors(path, specs, _tensors(adapter, groups, shapes, alphas=written.underscores), metadata)


def _groups(adapter: Adapter, written: _Format) -> dict[str, tuple[str, ...]]:
    """Return the modules of diffusers that each name of the file stands for, in order, those that are not adapted too."""
    groups: dict[str, tuple[str, ...]] = {}
    for module in adapter.modules:
        if written.blocks is None:
            groups[module] = (module,)
            continue
        match = _BLOCK.fullmatch(module)
        if match is None:
            raise UnknownNameError(module)
        kind, names = written.blocks[match["kind"]]
        found = next((name for name, parts in names.items() if match["inside"] in parts), None)
        if found is None:
            raise UnknownNameError(module)
        block = module.removesuffix(match["inside"])
        groups[f"{kind}.{match['number']}.{found}"] = tuple(f"{block}{part}" for part in names[found])
    return groups


def _shapes_of(adapter: Adapter, parts: tuple[str, ...], shapes: Mapping[str, Shape]) -> tuple[Shape, Shape]:
    rank = sum(adapter.ranks.get(part, 0) for part in parts)
    if len(parts) == 1:
        return factor_shapes(adapter.shapes[parts[0]], rank)
    return (rank, shapes[parts[0]][1]), (sum(shapes[part][0] for part in parts), rank)


def _tensors(
    adapter: Adapter, groups: Mapping[str, tuple[str, ...]], shapes: Mapping[str, Shape], *, alphas: bool
) -> Iterator[torch.Tensor]:
    for parts in groups.values():
        present = {part: adapter.factors(part) for part in parts if part in adapter.shapes}
        yield torch.cat([each.A_RI for each in present.values()])
        yield _blocks(present, parts, shapes)
        if alphas:
            yield torch.tensor(float(sum(each.rank for each in present.values())))


def _blocks(present: Mapping[str, LoraFactors], parts: tuple[str, ...], shapes: Mapping[str, Shape]) -> torch.Tensor:
    """Return the scaled B of each part in rows and columns of its own; rows of a part that is not adapted are zeros."""
    rank, column = sum(each.rank for each in present.values()), 0
    rows = []
    for part in parts:
        of_part = present.get(part)
        rows_OR = torch.zeros(len(of_part.B_OR) if of_part else shapes[part][0], rank)
        if of_part:
            rows_OR[:, column : column + of_part.rank] = of_part.scale * of_part.B_OR
            column += of_part.rank
        rows.append(rows_OR)
    return torch.cat(rows)
