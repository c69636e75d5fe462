import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.training import add_adapter, export_adapter, trainable_parameters
from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.storage import RunFolder

SETTINGS = LoraSettings(rank=4, alpha=8)


@pytest.fixture(scope="module")
def family(tiny_pipeline_dir: Path) -> Any:
    return open_family(ModelConfig(name=str(tiny_pipeline_dir)))


def noise_prediction(denoiser: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        return denoiser(latents, torch.tensor([500]), encoder_hidden_states=text).sample


def test_only_the_attention_projections_are_trained(family: Any) -> None:
    names = trainable_parameters(add_adapter(family.load_denoiser(), SETTINGS, "tiny", seed=0))
    assert names
    assert all("lora_" in name and name.split(".lora_")[0].endswith(SETTINGS.targets) for name in names)


def test_every_expert_of_a_run_starts_from_the_same_factors(family: Any) -> None:
    first, second, other = (
        trainable_parameters(add_adapter(family.load_denoiser(), SETTINGS, "tiny", seed=seed)) for seed in (0, 0, 1)
    )
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_an_exported_adapter_reloads_to_the_same_denoiser(family: Any, tmp_path: Path) -> None:
    model = add_adapter(family.load_denoiser(), SETTINGS, "tiny", seed=0, revision="abc")
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    export_adapter(model, trainable_parameters(model), RunFolder(str(tmp_path)), "experts/counting")
    reloaded = PeftModel.from_pretrained(family.load_denoiser(), str(tmp_path / "experts/counting"))
    assert torch.equal(noise_prediction(reloaded), noise_prediction(model))
    assert not torch.allclose(noise_prediction(reloaded), noise_prediction(family.load_denoiser()))
    config = json.loads((tmp_path / "experts/counting/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny", "abc")


def test_targets_that_name_no_module_are_refused(family: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"experts.lora.targets must name modules of tiny, it has none named .to_nothing."
    ):
        add_adapter(family.load_denoiser(), LoraSettings(targets=("to_nothing",)), "tiny", seed=0)
