"""What LoRA files hold for CLIP text encoders: which part of a pipeline it is for, and how its modules are called there.

LoRA files call modules as transformers did before its version 5, `text_model.encoder…`; newer CLIPTextModels have no `text_model`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from selma_ray.adapters.files import CONFIG_FILE, TEXT_ENCODERS
from selma_ray.adapters.peft_format import Shape
from selma_ray.adapters.targets import adaptable_shapes
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import empty_part
from selma_ray.models.family import has_part, pipeline_class_of
from selma_ray.models.locate import locate_text_to_image

__all__ = ["encoder_shapes", "is_told", "kohya_prefixes", "part_of", "plain_name", "text_parts", "written_name"]

_TOLD = re.compile(r"(lora_te\d?_|text_encoders?(_\d)?\.|te\d?\.|conditioner\.|text_model\.)")
_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_ABOVE = "text_model."
_CLIP_ALONE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def is_told(key: str) -> bool:
    """Tell whether a tensor of a LoRA file is of a text encoder."""
    return _TOLD.match(key) is not None


def part_of(key: str) -> tuple[str | None, str]:
    """Return what a pipeline calls the text encoder that a tensor is of, and the rest of its name; None for one that is not known."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    return (_PREFIXES[prefix], key.removeprefix(prefix)) if prefix else (None, key)


def encoder_shapes(model: ModelConfig) -> dict[str, dict[str, Shape]]:
    """Return the shape of every weight that can be adapted of each CLIP text encoder, where a family has no others; no weights are read."""
    located = locate_text_to_image(model.name, model.revision)
    if pipeline_class_of(model, located) not in _CLIP_ALONE:
        return {}
    with torch.device("meta"):
        return {
            part: adaptable_shapes(empty_part(model, located, part)) for part in TEXT_ENCODERS if has_part(model, part)
        }


def plain_name(module: str, shapes: Iterable[str]) -> str:
    """Return what a model calls a module, dotted or in kohya's underscores; a name that it does not have stays as it is."""
    for own in shapes:
        for name in (own, written_name(own)):
            if module in (name, name.replace(".", "_")):
                return own
    return module


def written_name(module: str) -> str:
    """Return what LoRA files call a module of a CLIP text encoder."""
    return module if module.startswith((_ABOVE, "text_projection")) else f"{_ABOVE}{module}"


def kohya_prefixes(parts: Mapping[str, object], *, two: bool) -> dict[str, str]:
    """Return how kohya's names of modules of text encoders start: those of a model with `two` are numbered."""
    names = {"text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    return {part: names[part] for part in parts}


def text_parts(folder: Path) -> list[str]:
    """Return the text encoders that an adapter's folder has parts for, each an adapter's folder itself."""
    return [part for part in TEXT_ENCODERS if (folder / part / CONFIG_FILE).is_file()]
