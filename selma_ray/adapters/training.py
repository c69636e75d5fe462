"""LoRA on a denoiser: PEFT's adapter before training, and its folder in PEFT's format after it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.files import ADAPTER_FILES
from selma_ray.adapters.targets import check_targets
from selma_ray.storage import RunFolder

__all__ = ["add_adapter", "export_adapter", "trainable_parameters"]


def add_adapter(
    denoiser: torch.nn.Module, settings: LoraSettings, model_name: str, seed: int, revision: str | None = None
) -> PeftModel:
    """Wrap `denoiser` with a LoRA adapter, A Gaussian and B zero, everything else frozen.

    The adapter carries its base's name and revision, which PEFT cannot read off a denoiser and merging compares.

    The seed is the run's, so that all experts start from the same A: averaging factors (SELMA, section 3.4) presumes it.
    Raises ConfigError where a target names no module, or one that could not be merged.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        init_lora_weights="gaussian",
    )
    check_targets(denoiser, settings.targets, model_name)
    torch.manual_seed(seed)
    model = get_peft_model(denoiser, config)
    described = model.peft_config["default"]
    described.base_model_name_or_path, described.revision = model_name, revision
    return model


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def export_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], folder: RunFolder, directory: str) -> None:
    """Write a PEFT adapter folder with fp32 `weights`; adapter_config.json comes last and means that the rest is there."""
    with tempfile.TemporaryDirectory() as temporary:
        # No embedding is trained; PEFT would ask the hub for the base model's configuration to find that out.
        model.save_pretrained(temporary, state_dict=dict(weights), save_embedding_layers=False)
        for name in ADAPTER_FILES:
            folder.write_bytes((Path(temporary) / name).read_bytes(), directory, name)
