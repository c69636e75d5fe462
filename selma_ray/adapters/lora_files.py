"""Reading LoRAs of others: single files in diffusers' and kohya's formats, which diffusers itself converts, and PEFT folders.

Shapes: I input features, O output features, R rank.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from selma_ray.adapters.mixing import LowRank
from selma_ray.adapters.peft_format import open_adapter
from selma_ray.errors import AdapterError, first_line
from selma_ray.models.parts import DENOISERS

__all__ = ["open_lora"]

logger = logging.getLogger(__name__)

_NOT_PLAIN = ("dora_scale", "hada_", "lokr_", "lora_mid", "lora_magnitude_vector", ".diff", "oft_")
"""Parts of the names of weights that are no plain low-rank delta."""
_SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B"}


def open_lora(path: str | Path, denoiser: Any, pipeline_class: Any) -> dict[str, LowRank]:
    """Read a PEFT folder or a .safetensors file for a model's denoiser, the scale folded into B; `pipeline_class` is diffusers'.

    What it has for text encoders is left out, with a warning. Raises AdapterError where it is no plain LoRA of the model's denoiser.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return {each.module: LowRank(each.A_RI, each.scale * each.B_OR) for each in open_adapter(path)}
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path} must be a .safetensors file or a folder in PEFT's format; save the LoRA as one")
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; name a .safetensors file or a folder in PEFT's format")
    state, alpha = _read(path)
    name = next(each for each in DENOISERS if hasattr(pipeline_class, f"{each}_name"))
    return _expert(path, *_converted(path, state, denoiser, pipeline_class), name, alpha)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return a file's tensors, and the alpha of all modules where diffusers' header says one."""
    try:
        with safe_open(path, framework="pt") as tensors:
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            described = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read ({first_line(error)}); it is truncated or no safetensors file"
        ) from None
    for key, tensor in state.items():
        if any(part in key for part in _NOT_PLAIN):
            raise AdapterError(
                f"{path}: {key} is no weight of a plain LoRA; export a LoRA without DoRA, LoHa, LoKr or full weights"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {key} must be finite, holds NaN or infinity; take another file")
    alphas = [value for key, value in described.items() if key.endswith(".lora_alpha")]
    return state, alphas[0] if alphas else None


def _converted(
    path: Path, state: Mapping[str, torch.Tensor], denoiser: Any, pipeline_class: Any
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, float]]:
    """Return the tensors under the names that diffusers gives PEFT, and alphas by module."""
    try:
        converted = pipeline_class.lora_state_dict(dict(state), unet_config=denoiser.config, return_alphas=True)
    except Exception as error:  # whatever a file of another kind makes the conversion stumble over
        raise AdapterError(
            f"{path} must be a LoRA for {pipeline_class.__name__} in diffusers' or kohya's format ({first_line(error)}); take another file"
        ) from None
    tensors, alphas = converted if isinstance(converted, tuple) else (converted, None)
    tensors, alphas = (convert_unet_state_dict_to_peft(each or {}) for each in (tensors, alphas))
    return tensors, {key.removesuffix(".alpha").removesuffix(".lora_A.weight"): alpha for key, alpha in alphas.items()}


def _expert(
    path: Path, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float], denoiser: str, alpha: float | None
) -> dict[str, LowRank]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    others = set()
    for key, tensor in tensors.items():
        suffix = next((each for each in _SIDES if key.endswith(each)), None)
        part, _, module = key.removesuffix(suffix or "").partition(".")
        if part != denoiser:
            others.add(part)
        elif suffix is not None:
            sides.setdefault(module, {})[_SIDES[suffix]] = tensor
    if not sides:
        raise AdapterError(f"{path} holds nothing for the model's {denoiser}; take a LoRA for this model")
    if others:
        logger.warning(
            "%s: what it has for %s is left out; the %s alone is adapted", path, ", ".join(sorted(others)), denoiser
        )
    return {
        module: _low_rank(path, module, pair, alphas.get(f"{denoiser}.{module}", alpha))
        for module, pair in sides.items()
    }


def _low_rank(path: Path, module: str, pair: Mapping[str, torch.Tensor], alpha: float | None) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{path}: {module} must have both factors, has one; export the LoRA again")
    # A convolution of 1 x 1 pixels is a linear module.
    A_RI, B_OR = (tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor for tensor in (pair["A"], pair["B"]))
    if A_RI.dim() != 2 or B_OR.dim() != 2 or len(A_RI) != B_OR.shape[1]:
        raise AdapterError(
            f"{path}: {module} must have factors (R, I) and (O, R), got {tuple(A_RI.shape)} and {tuple(B_OR.shape)}; "
            "export a LoRA of linear layers"
        )
    scale = 1.0 if alpha is None else float(alpha) / len(A_RI)
    return LowRank(A_RI, scale * B_OR)
