"""Folding a merged delta into a pipeline's dense weights, so that the result is an ordinary diffusers folder."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from selma_ray.adapters.deltas import Delta
from selma_ray.adapters.peft_format import Shape
from selma_ray.adapters.streaming import DTYPES, TensorSpec, write_safetensors
from selma_ray.errors import AdapterError, ModelNotFoundError, first_line
from selma_ray.merging.pipeline_files import copy_file, pipeline_files
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.models.parts import DENOISERS

__all__ = ["PartDeltas", "bake_pipeline", "denoiser_name", "pipeline_folder"]

PartDeltas = tuple[Mapping[str, Shape], Callable[[str], Delta]]
"""The shape of each weight of a part that changes, and what is added to it."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pipeline_folder(model: ModelConfig) -> Path:
    """Return the local folder of a pipeline, downloaded first where the recipe gives a hub name."""
    located = locate_text_to_image(model.name, model.revision)
    if Path(located.path).is_dir():
        return Path(located.path)
    try:
        return Path(
            DiffusionPipeline.download(
                located.path, revision=model.revision, variant=model.variant, use_safetensors=True
            )
        )
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model.name {model.name} cannot be downloaded ({first_line(error)}); give a local folder"
        ) from None


def bake_pipeline(
    source: Path,
    target: Path,
    shapes: Mapping[str, Shape],
    merged: Callable[[str], Delta],
    dtype: torch.dtype,
    variant: str | None = None,
    text_encoders: Mapping[str, PartDeltas] | None = None,
) -> None:
    """Copy the pipeline folder `source` to `target` with `merged(module)` added to each denoiser module's weight.

    `text_encoders` are changed likewise, by their names in the pipeline.

    `shapes` maps each module to its weight's. A changed weight is stored in the wider of its own dtype and `dtype`, so that baking loses
    nothing that rendering in `dtype` would keep. Of a `variant` the copy holds that one alone,
    named as plain weights are. Raises AdapterError where a module is not the base's or its shape differs.
    """
    changes = {denoiser_name(source): (shapes, merged), **(text_encoders or {})}
    files = pipeline_files(source, variant)
    weights = {
        part: [file for file in files if file.source.parts[0] == part and file.source.suffix == ".safetensors"]
        for part in changes
    }
    for part, of_part in weights.items():
        if not of_part:
            raise AdapterError(f"{source / part} holds no safetensors weights; save the pipeline with safetensors")
        _check_modules([source / file.source for file in of_part], changes[part][0])
    for file in files:
        if not any(file in of_part for of_part in weights.values()):
            copy_file(source / file.source, target / file.target)
    for part, of_part in weights.items():
        for file in of_part:
            (target / file.target).parent.mkdir(parents=True, exist_ok=True)
            _bake_file(source / file.source, target / file.target, *changes[part], dtype)


def denoiser_name(source: Path) -> str:
    """Return whether a pipeline's denoiser is its unet or its transformer."""
    parts = json.loads((source / "model_index.json").read_text())
    for name in DENOISERS:
        if name in parts:
            return name
    raise AdapterError(
        f"{source / 'model_index.json'} must name a unet or a transformer, names neither; use another pipeline"
    )


def _check_modules(files: list[Path], shapes: Mapping[str, Shape]) -> None:
    stored: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                stored[_module_of(key, shapes) or key] = tuple(tensors.get_slice(key).get_shape())
    for module, shape in shapes.items():
        got = stored.get(module)
        if got != shape:
            what = f"has shape {got}" if got else "is missing"
            raise AdapterError(
                f"{files[0]}: {module}.weight must have shape {shape} as the adapters do, it {what}; "
                "merge experts that were fitted to this base"
            )


def _module_of(key: str, shapes: Mapping[str, Shape]) -> str | None:
    """Return the module to change whose weight a tensor is; files of older transformers name a text encoder's after `text_model`."""
    if not key.endswith(".weight"):
        return None
    module = key.removesuffix(".weight")
    return next((name for name in (module, module.removeprefix("text_model.")) if name in shapes), None)


def _bake_file(
    source: Path,
    target: Path,
    shapes: Mapping[str, Shape],
    merged: Callable[[str], Delta],
    dtype: torch.dtype,
) -> None:
    with safe_open(source, framework="pt") as tensors:
        specs = []
        for key in tensors.keys():  # noqa: SIM118
            view = tensors.get_slice(key)
            stored = DTYPES.get(view.get_dtype())
            changed = _module_of(key, shapes) is not None
            if stored is None or (changed and stored not in _FLOATS):
                raise AdapterError(
                    f"{source}: {key} must be F16, BF16, F32 or F64 to be merged, is {view.get_dtype()}; use such weights"
                )
            specs.append(
                TensorSpec(key, torch.promote_types(stored, dtype) if changed else stored, tuple(view.get_shape()))
            )

        def baked() -> Iterator[torch.Tensor]:
            for spec in specs:
                weight = tensors.get_tensor(spec.name)
                module = _module_of(spec.name, shapes)
                if module is not None:
                    weight = merged(module).added_to(weight)
                yield weight

        write_safetensors(target, specs, baked())
