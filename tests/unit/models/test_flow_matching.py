"""What families of flow matching have in common, by the same tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from selma_ray.adapters.applying import load_adapted_pipeline
from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.training import add_adapter, export_adapter, trainable_parameters
from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import LossSettings, open_family
from selma_ray.models.rendering import Renderer, load_pipeline
from selma_ray.storage import RunFolder
from tests.unit.models.tiny_families import FLOW_FAMILIES

SHIFT, SCALE = 0.0609, 1.5305
SAMPLING = SamplingConfig(steps=3, guidance_scale=3.0, width_px=64, height_px=64)


@pytest.fixture(scope="module", params=list(FLOW_FAMILIES))
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def model(name: Any, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp(name) / "model"
    FLOW_FAMILIES[name](folder, tiny_pipeline_dir)
    return ModelConfig(name=str(folder))


@pytest.fixture(scope="module")
def family(model: ModelConfig) -> Any:
    return open_family(model)


@pytest.fixture(scope="module")
def batch(family: Any) -> Any:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    encoders = family.load_encoders("cpu")
    return encoders.encode_images(images) | encoders.encode_prompts(["two apples", "a cat"], 64, 48)


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_conditioning_is_what_the_pipeline_makes(name: Any, model: ModelConfig, batch: Any) -> None:
    pipeline = load_pipeline(model, "cpu")
    if name == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(
            ["two apples", "a cat"], None, None, device="cpu", do_classifier_free_guidance=False
        )
    else:
        text, pooled, _ = pipeline.encode_prompt(["two apples", "a cat"], None, device="cpu")
    torch.testing.assert_close(batch["text_NTD"], text, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch["pooled_NP"], pooled, rtol=1e-3, atol=1e-4)


class Recorder(torch.nn.Module):
    """Stands for a transformer: keeps what it was called with and answers with what it was given."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.called: dict = {}

    def forward(self, **arguments: Any) -> Any:
        self.called = arguments
        return (arguments["hidden_states"],)


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_the_velocity_leads_from_latents_to_noise(name: Any, family: Any, batch: Any) -> None:
    row = {key: tensor[:1] for key, tensor in batch.items()}
    draw = torch.Generator().manual_seed(5)
    latents = (row["latent_mean"] + row["latent_std"] * torch.randn(1, 4, 16, 12, generator=draw) - SHIFT) * SCALE
    noise = torch.randn(1, 4, 16, 12, generator=draw)
    uniform = torch.randn(1, generator=draw).sigmoid()
    sigma = 3 * uniform / (1 + 2 * uniform) if name == "sd3" else uniform
    noisy = (1 - sigma) * latents + sigma * noise
    recorder = Recorder(family.load_denoiser())
    loss = family.errors(recorder, row, [torch.Generator().manual_seed(5)]).mean()
    torch.testing.assert_close(loss, ((noisy - (noise - latents)) ** 2).mean(), rtol=1e-4, atol=1e-5)
    told = recorder.called["timestep"] / (1000 if name == "sd3" else 1)
    torch.testing.assert_close(told, sigma, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux"], indirect=True)
def test_patches_go_in_and_out_as_the_pipeline_packs_them(family: Any, batch: Any) -> None:
    from diffusers import FluxPipeline

    recorder = Recorder(family.load_denoiser())
    noisy = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    velocity = family._denoise(recorder, noisy, torch.tensor([500.0, 600.0]), family._told(batch, LossSettings()))
    assert torch.equal(velocity, noisy)
    unpacked = FluxPipeline._unpack_latents(recorder.called["hidden_states"], 64, 48, vae_scale_factor=4)
    assert torch.equal(unpacked, noisy)


def test_a_fitted_adapter_lowers_the_loss_round_trips_and_changes_images(
    family: Any, model: ModelConfig, batch: Any, tmp_path: Path
) -> None:
    adapted = add_adapter(family.load_denoiser(), LoraSettings(rank=8, alpha=8), model.name, seed=0)
    assert trainable_parameters(adapted)
    optimizer = torch.optim.AdamW(trainable_parameters(adapted).values(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = family.errors(adapted, batch, [torch.Generator().manual_seed(seed) for seed in (1, 2)]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    export_adapter(adapted, trainable_parameters(adapted), RunFolder(str(tmp_path)), "fitted")
    images = [
        np.asarray(
            Renderer(load_adapted_pipeline(model, adapter, "cpu"), SAMPLING).render(["two apples"], [0])[0], dtype=float
        )
        for adapter in (None, tmp_path / "fitted", tmp_path / "fitted")
    ]
    assert np.array_equal(images[1], images[2])
    assert not np.array_equal(images[0], images[1])
    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(family.load_denoiser(), str(tmp_path / "fitted"))
    before, after = (get_peft_model_state_dict(each) for each in (adapted, reloaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_min_snr_weighting_is_refused(family: Any, batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"experts.min_snr_gamma must be left out for .* flow matching, got 5"):
        family.errors(family.load_denoiser(), batch, [torch.Generator()] * 2, LossSettings(min_snr_gamma=5.0))
