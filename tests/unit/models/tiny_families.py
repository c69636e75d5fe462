"""A small random model of every family, by the name of its module."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tiny_models import save_tiny_stable_diffusion
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3
from tests.unit.models.tiny_language_flow_models import (
    save_tiny_flux2_klein,
    save_tiny_qwen_image,
    save_tiny_sana,
    save_tiny_z_image,
)
from tests.unit.models.tiny_sdxl import save_tiny_sdxl

Save = Callable[[Path, Path], None]
"""Writes a pipeline folder; its second argument is a tiny Stable Diffusion's, whose tokenizer others take."""

FLOW_FAMILIES: Mapping[str, Save] = {
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
    "z_image": save_tiny_z_image,
    "flux2": save_tiny_flux2_klein,
    "qwen_image": save_tiny_qwen_image,
    "sana": save_tiny_sana,
}
FAMILIES: Mapping[str, Save] = {
    "stable_diffusion": lambda folder, _: save_tiny_stable_diffusion(folder),
    "sdxl": save_tiny_sdxl,
    **FLOW_FAMILIES,
}
