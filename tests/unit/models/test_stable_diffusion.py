from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import LossSettings, open_family
from tests.tiny_models import save_tiny_stable_diffusion

NUM_TIMESTEPS = 1000


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def tiny_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param) / "sd"
    save_tiny_stable_diffusion(folder, prediction_type=request.param)
    return folder, request.param


@pytest.fixture(scope="module")
def epsilon_family(tiny_pipeline_dir: Path) -> Any:
    return open_family(ModelConfig(name=str(tiny_pipeline_dir)))


def random_batch(num_examples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "latent_mean": torch.randn(num_examples, 4, 16, 16, generator=generator),
        "latent_std": torch.rand(num_examples, 4, 16, 16, generator=generator),
        "text_NTD": torch.randn(num_examples, 77, 32, generator=generator),
    }


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def loss_by_formula(unet: Any, batch: Any, seeds: Any, prediction_type: Any, scaling_factor: Any) -> Any:
    """The training loss of DDPM (2006.11239) and of v-prediction (2202.00512), one example at a time."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    losses = []
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, 4, 16, 16)
        latent = batch["latent_mean"][row] + batch["latent_std"][row] * torch.randn(shape, generator=generator)[0]
        latent = latent * scaling_factor
        noise = torch.randn(shape, generator=generator)[0]
        timestep = torch.randint(NUM_TIMESTEPS, (1,), generator=generator)
        signal_share, noise_share = kept[timestep].sqrt().float(), (1 - kept[timestep]).sqrt().float()
        noisy = signal_share * latent + noise_share * noise
        target = noise if prediction_type == "epsilon" else signal_share * noise - noise_share * latent
        prediction = unet(noisy[None], timestep, batch["text_NTD"][row : row + 1]).sample[0]
        losses.append(((prediction - target) ** 2).mean())
    return torch.stack(losses).mean()


def test_loss_equals_the_formula(tiny_dir: Any) -> None:
    folder, prediction_type = tiny_dir
    family = open_family(ModelConfig(name=str(folder)))
    unet, batch, seeds = family.load_denoiser().eval(), random_batch(3), (11, 12, 13)
    with torch.no_grad():
        loss = family.errors(unet, batch, generators(*seeds)).mean()
        expected = loss_by_formula(unet, batch, seeds, prediction_type, family.latent_scale)  # type: ignore[attr-defined]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weighs_the_error_of_the_clean_latents(tiny_dir: Any) -> None:
    """Hang et al., 2303.09556: both predictions weighted give the clean latents' error times min(SNR, gamma)."""
    folder, prediction_type = tiny_dir
    family = open_family(ModelConfig(name=str(folder)))
    unet, batch, gamma = family.load_denoiser().eval(), random_batch(1), 5.0
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2, 0)
    for seed in (11, 12, 13, 14):
        with torch.no_grad():
            plain = family.errors(unet, batch, generators(seed)).mean()
            weighted = family.errors(unet, batch, generators(seed), LossSettings(min_snr_gamma=gamma)).mean()
        draw = generators(seed)[0]
        for _ in range(2):
            torch.randn((1, 4, 16, 16), generator=draw)
        share = kept[torch.randint(NUM_TIMESTEPS, (1,), generator=draw)]
        snr = (share / (1 - share)).item()
        of_clean = 1 / snr if prediction_type == "epsilon" else 1 / (snr + 1)
        assert weighted.item() == pytest.approx(plain.item() * min(snr, gamma) * of_clean, rel=1e-3)


def test_the_loss_of_a_batch_is_the_mean_of_its_examples_losses(epsilon_family: Any) -> None:
    unet, batch = epsilon_family.load_denoiser().eval(), random_batch(4)
    with torch.no_grad():
        whole = epsilon_family.errors(unet, batch, generators(1, 2, 3, 4)).mean()
        halves = [
            epsilon_family.errors(
                unet, {name: tensor[part] for name, tensor in batch.items()}, generators(*seeds)
            ).mean()
            for part, seeds in ((slice(0, 2), (1, 2)), (slice(2, 4), (3, 4)))
        ]
    torch.testing.assert_close(whole, torch.stack(halves).mean(), rtol=1e-4, atol=1e-5)


def test_fitting_lora_on_a_few_examples_lowers_the_loss(tiny_dir: Any) -> None:
    folder, _ = tiny_dir
    family = open_family(ModelConfig(name=str(folder)))
    torch.manual_seed(0)
    lora = LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    model = get_peft_model(family.load_denoiser(), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    batch, losses = random_batch(4), []
    for _ in range(40):
        loss = family.errors(model, batch, generators(1, 2, 3, 4)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_encoders_give_what_the_pipeline_gives(epsilon_family: Any, tiny_pipeline_dir: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    encoders = epsilon_family.load_encoders("cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    latents = encoders.encode_images(images)
    text = encoders.encode_prompts(["two red apples", "a cat"], 64, 64)["text_NTD"]
    expected_text, _ = pipeline.encode_prompt(["two red apples", "a cat"], "cpu", 1, do_classifier_free_guidance=False)
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess([image / 255.0 for image in images]).float()
        posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(text, expected_text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents["latent_mean"], posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents["latent_std"], posterior.std, rtol=1e-4, atol=1e-5)


def test_what_is_encoded_for_a_row_does_not_depend_on_its_batch(epsilon_family: Any) -> None:
    encoders = epsilon_family.load_encoders("cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    together, alone = encoders.encode_images(images), encoders.encode_images(images[1:2])
    assert torch.equal(together["latent_mean"][1], alone["latent_mean"][0])
    prompts = encoders.encode_prompts(["a", "two red apples", "b"], 64, 64)["text_NTD"]
    assert torch.equal(prompts[1], encoders.encode_prompts(["two red apples"], 64, 64)["text_NTD"][0])


def test_the_trainer_side_loads_no_encoder(epsilon_family: Any) -> None:
    names = {type(module).__name__ for module in epsilon_family.load_denoiser().modules()}
    assert "UNet2DConditionModel" in names
    assert not {"AutoencoderKL", "CLIPTextModel", "CLIPTextTransformer"} & names


def test_another_family_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline.*KandinskyPipeline"):
        open_family(ModelConfig(name=str(tmp_path)))


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match=r"model_index\.json must be a pipeline's index"):
        open_family(ModelConfig(name=str(tmp_path)))


def test_an_unknown_prediction_type_is_refused(tmp_path: Path) -> None:
    save_tiny_stable_diffusion(tmp_path / "sd", prediction_type="sample")
    family = open_family(ModelConfig(name=str(tmp_path / "sd")))
    with pytest.raises(ConfigError, match="must be epsilon or v_prediction, got 'sample'"):
        family.errors(family.load_denoiser(), random_batch(1), generators(0))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    save_tiny_stable_diffusion(tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"the UNet of model.name .* cannot be loaded"):
        open_family(ModelConfig(name=str(tmp_path / "sd"))).load_denoiser()
