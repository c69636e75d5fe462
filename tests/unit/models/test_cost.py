"""Traced figures against what the tiny models of every family really hold and allocate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.training import add_adapter, trainable_parameters
from selma_ray.errors import ModelNotFoundError
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import pipeline_parameters, training_cost
from selma_ray.models.family import open_family
from selma_ray.models.rendering import load_pipeline
from tests.unit.models.measuring import longest, most_allocated_bytes, random_examples

LORA = LoraSettings(rank=4, alpha=4)
BATCH = 4


@pytest.fixture(scope="module")
def cost(model: ModelConfig) -> Any:
    return training_cost(model, 64, 64, LORA.rank, LORA.targets)


def adapted_denoiser(model: Any, *, gradient_checkpointing: bool = False) -> Any:
    denoiser = open_family(model).load_denoiser()
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return add_adapter(denoiser, LORA, model.name, seed=0).train()


def peak_bytes(model: Any, denoiser: Any) -> int:
    """Return the most that is allocated at once, beyond what was there, during one forward and backward pass."""
    family = open_family(model)
    batch = random_examples(family, BATCH, 64, 64)

    def step() -> None:
        denoiser.zero_grad()
        family.errors(denoiser, batch, [torch.Generator().manual_seed(seed) for seed in range(BATCH)]).mean().backward()

    return most_allocated_bytes(step)


def test_weights_are_counted_without_loading_them(model: ModelConfig, cost: Any) -> None:
    pipeline = load_pipeline(model, "cpu")
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert pipeline_parameters(model) == parts
    assert cost.parameters == parts.get("unet", parts.get("transformer"))
    adapter = trainable_parameters(adapted_denoiser(model)).values()
    assert cost.lora_parameters == sum(parameter.numel() for parameter in adapter)
    changed = [name for name, _ in adapted_denoiser(model).named_modules() if name.endswith(".base_layer")]
    denoiser = adapted_denoiser(model)
    assert cost.adapted_parameters == sum(denoiser.get_submodule(name).weight.numel() for name in changed)


def test_shapes_are_those_of_encoded_examples(model: ModelConfig) -> None:
    import numpy as np

    encoders = open_family(model).load_encoders("cpu")
    encoded = encoders.encode_images(np.zeros((1, 64, 48, 3), np.uint8)) | encoders.encode_prompts(["a cat"], 64, 48)
    shapes = open_family(model).example_shapes(64, 48)
    assert {name: longest(name, tensor.shape[1:], shapes) for name, tensor in encoded.items()} == shapes


def test_shapes_are_those_of_the_miniature_whose_prompts_are_shorter() -> None:
    shapes = open_family(ModelConfig()).example_shapes(64, 64)
    assert shapes["text_NTD"] == (64, 128)


def test_activations_are_as_large_as_they_are_when_measured(model: ModelConfig, cost: Any) -> None:
    """The estimates were seen from 5 per cent below the peak (FLUX, whose one block is all of this model) to 20 above (SD3)."""
    measured = peak_bytes(model, adapted_denoiser(model))
    estimate = BATCH * cost.activation_bytes + 4 * cost.lora_parameters
    assert 0.93 * measured < estimate < 1.25 * measured


def test_with_gradient_checkpointing_the_estimate_is_a_rough_bound(model: ModelConfig, cost: Any) -> None:
    """It counts the whole of the largest block, which UNets compute again layer by layer: 2.2 times the peak for SDXL, 0.91 for FLUX."""
    measured = peak_bytes(model, adapted_denoiser(model, gradient_checkpointing=True))
    estimate = BATCH * cost.checkpointed_bytes + 4 * cost.lora_parameters
    assert 0.88 * measured < estimate < 2.4 * measured
    assert cost.checkpointed_bytes < cost.activation_bytes


def test_a_step_computes_more_than_a_prediction(cost: Any) -> None:
    assert 1.9 < cost.step_flops / cost.forward_flops < 3.3


def test_a_model_without_a_configuration_is_named(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    (tmp_path / "model" / "vae" / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"the configuration of vae of model.name .* cannot be loaded"):
        training_cost(ModelConfig(name=str(tmp_path / "model")), 64, 64, LORA.rank, LORA.targets)
