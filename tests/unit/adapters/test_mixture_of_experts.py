"""A mixture in the denoiser against PEFT's own adapters, and its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selma_ray.adapters.applying import load_adapted_pipeline
from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.mixture_of_experts import add_mixture, load_mixture, read_experts, write_mixture
from selma_ray.adapters.peft_format import open_adapter
from selma_ray.adapters.training import add_adapter, export_adapter, trainable_parameters
from selma_ray.errors import AdapterError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import open_family
from selma_ray.models.rendering import Renderer
from selma_ray.storage import RunFolder
from tests.tiny_models import save_tiny_stable_diffusion

NAMES = ("counting", "style")


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def folder(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run folder with two experts whose scale is not one, and a mixture of them with random routers."""
    run = RunFolder(str(tmp_path_factory.mktemp("run")))
    torch.manual_seed(0)
    for name in NAMES:
        adapted = add_adapter(open_family(model).load_denoiser(), LoraSettings(rank=4, alpha=8), model.name, seed=0)
        for key, parameter in trainable_parameters(adapted).items():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        export_adapter(adapted, trainable_parameters(adapted), run, f"experts/{name}")
    experts = read_experts([run.local_path("experts", name) for name in NAMES])
    routers = {f"{module}.router_KI": torch.randn(2, factors.A_RI.shape[1]) for module, factors in experts.items()}
    write_mixture(run, "experts/moe", NAMES, experts, routers, model.name, "abc")
    return run


def prediction(denoiser: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        return denoiser.eval()(latents, torch.tensor([500, 20]), encoder_hidden_states=text).sample


def expert(folder: Any, model: Any, weights: dict[str, float]) -> Any:
    """Return the denoiser with the experts' weighed deltas added, as PEFT adds them."""
    from peft import PeftModel

    denoiser = open_family(model).load_denoiser()
    for name, weight in weights.items():
        adapted = PeftModel.from_pretrained(denoiser, folder.path("experts", name), adapter_name=name)
        for layer in adapted.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale(name, weight)
        denoiser = adapted.merge_and_unload()
    return denoiser


def mixed(folder: Any, model: Any, routers: Any = None) -> Any:
    denoiser = open_family(model).load_denoiser()
    add_mixture(denoiser, read_experts([folder.local_path("experts", name) for name in NAMES]), routers)
    return denoiser


def test_a_new_mixture_is_the_mean_of_its_experts(folder: Any, model: ModelConfig) -> None:
    mean = prediction(expert(folder, model, {"counting": 0.5, "style": 0.5}))
    torch.testing.assert_close(prediction(mixed(folder, model)), mean, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(mean, prediction(open_family(model).load_denoiser()), atol=1e-2)


def test_a_router_that_is_sure_takes_one_expert_for_each_token(folder: Any, model: ModelConfig) -> None:
    mixture = mixed(folder, model)
    module = next(each for each in mixture.modules() if hasattr(each, "router_KI"))
    width = module.base.in_features
    direction = torch.ones(width) / width
    module.router_KI.data = torch.stack([1e4 * direction, -1e4 * direction])
    tokens = torch.stack([torch.ones(width), -torch.ones(width)])[None]
    first, second = (module.B_OR[:, at : at + 4] @ module.A_RI[at : at + 4] for at in (0, 4))
    expected = module.base(tokens) + torch.stack([first @ tokens[0, 0], second @ tokens[0, 1]])[None]
    torch.testing.assert_close(module(tokens), expected, rtol=1e-4, atol=1e-5)


def test_only_routers_are_trained(folder: Any, model: ModelConfig) -> None:
    assert all(name.endswith(".router_KI") for name in trainable_parameters(mixed(folder, model)))


def test_a_mixture_is_read_back_and_changes_images(folder: Any, model: ModelConfig) -> None:
    tensors = load_file(folder.local_path("experts", "moe", "adapter_model.safetensors"))
    prefix = "base_model.model."
    routers = {
        name.removeprefix(prefix).removesuffix(".router_KI"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".router_KI")
    }
    read = open_family(model).load_denoiser()
    load_mixture(read, folder.path("experts", "moe"))
    assert torch.equal(prediction(read), prediction(mixed(folder, model, routers)))
    sampling = SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64)
    images = [
        np.asarray(
            Renderer(load_adapted_pipeline(model, adapter, "cpu"), sampling).render(["two apples"], [0])[0], dtype=int
        )
        for adapter in (None, folder.path("experts", "moe"))
    ]
    assert not np.array_equal(*images)  # type: ignore[arg-type]


def test_what_merges_or_exports_plain_adapters_refuses_a_mixture(folder: Any) -> None:
    with pytest.raises(AdapterError, match=r"moe/adapter_config.json: peft_type must be 'LORA' .*, got 'MOE_LORA'"):
        open_adapter(folder.path("experts", "moe"))


@pytest.fixture
def broken(folder: Any, tmp_path: Path) -> Any:
    """Return a function that makes a mixture's folder with some tensors replaced, or its file cut short."""

    def make(change: Any = None, cut: int = 0) -> Any:
        target = tmp_path / "moe"
        shutil.copytree(folder.local_path("experts", "moe"), target)
        path = target / "adapter_model.safetensors"
        if change:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        return target

    return make


def drop_factor(tensors: Any) -> None:
    del tensors[next(name for name in tensors if name.endswith("lora_A.weight"))]


def spoil_router(tensors: Any) -> None:
    tensors[next(name for name in tensors if name.endswith(".router_KI"))][0, 0] = float("nan")


def widen_router(tensors: Any) -> None:
    name = next(name for name in tensors if name.endswith(".router_KI"))
    tensors[name] = torch.zeros(3, tensors[name].shape[1])


def drop_routers(tensors: Any) -> None:
    for name in [name for name in tensors if name.endswith(".router_KI")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_factor, r"lora_A.weight' is missing; train this mixture again"),
        (spoil_router, r"router_KI must be finite, holds NaN or infinity"),
        (widen_router, r"must have factors and routers of ranks \(4, 4\), has shapes"),
        (drop_routers, r"holds no routers; train this mixture again"),
    ],
)
def test_a_broken_mixture_is_refused_in_one_line(broken: Any, model: ModelConfig, change: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        load_mixture(open_family(model).load_denoiser(), broken(change))
    assert "\n" not in str(error.value)


def test_a_truncated_file_and_another_base_are_refused(
    broken: Any, folder: Any, model: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"cannot be read .* missing or truncated"):
        load_mixture(open_family(model).load_denoiser(), broken(cut=9))
    save_tiny_stable_diffusion(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "unet" / "config.json").read_text())
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel.from_config(config | {"cross_attention_dim": 16})
    with pytest.raises(AdapterError, match=r"must be a linear one of shape .* mix experts of this base"):
        load_mixture(other, folder.path("experts", "moe"))
