"""The loss of models of flow matching against the formula of diffusers' own training scripts, on the same noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline

from selma_ray.models.config import ModelConfig
from selma_ray.models.family import LossSettings, open_family
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.sana import _INSTRUCTION
from tests.unit.models.tiny_families import FLOW_FAMILIES

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
PROMPTS = ["two apples", "a cat on a red mat"]
SEEDS = (5, 6)
# mu of 192 tokens (or 48 positions of 2 x 2 latents): base_shift and max_shift over the lengths that they are of.
MU_FLUX2 = 0.5 + (48 - 256) * (1.15 - 0.5) / (4096 - 256)
MU_QWEN = 0.5 + (48 - 256) * (0.9 - 0.5) / (8192 - 256)


def shifted(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * uniform / (1 + (shift - 1) * uniform)


def pixels() -> torch.Tensor:
    return torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1


def scaled_latents(pipeline: Any) -> torch.Tensor:
    config = pipeline.vae.config
    return (pipeline.vae.encode(pixels()).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def sd3_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    return pipeline.transformer(noisy, text, pooled, timesteps, return_dict=False)[0]


def flux_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    text, pooled, text_ids = pipeline.encode_prompt(PROMPTS, None)
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 6, torch.device("cpu"), torch.float32)
    predicted = pipeline.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, 2, 4, 16, 12), timestep=timesteps / 1000, guidance=torch.full((2,), 3.5),
        pooled_projections=pooled, encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    return FluxPipeline._unpack_latents(predicted, 64, 48, 4)


def z_image_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    texts, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    predicted = pipeline.transformer(
        list(noisy.unsqueeze(2).unbind(0)), (1000 - timesteps) / 1000, texts, return_dict=False
    )[0]
    return -torch.stack(predicted, dim=0).squeeze(2)


def flux2_latents(pipeline: Any) -> torch.Tensor:
    return pipeline._encode_vae_image(pixels(), None)


def flux2_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    text, text_ids = pipeline.encode_prompt(PROMPTS)
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    predicted = pipeline.transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy), timestep=timesteps / 1000, guidance=None,
        encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    return Flux2KleinPipeline._unpack_latents_with_ids(predicted, ids)


def qwen_latents(pipeline: Any) -> torch.Tensor:
    config = pipeline.vae.config
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
    return (pipeline.vae.encode(pixels().unsqueeze(2)).latent_dist.mode() - mean).mul(1 / std)[:, :, 0]


def qwen_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    text, mask = pipeline.encode_prompt(PROMPTS)
    predicted = pipeline.transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy, 2, 4, 16, 12), timestep=timesteps / 1000,
        encoder_hidden_states=text, encoder_hidden_states_mask=mask, img_shapes=[[(1, 8, 6)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    return QwenImagePipeline._unpack_latents(predicted, 64, 48, 4)[:, :, 0]


def sana_latents(pipeline: Any) -> torch.Tensor:
    return pipeline.vae.encode(pixels()).latent * pipeline.vae.config.scaling_factor


def sana_velocity(pipeline: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    text, mask, *_ = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, complex_human_instruction=_INSTRUCTION
    )
    return pipeline.transformer(
        noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timesteps, return_dict=False
    )[0]


# Latents, velocity, and what a uniform noise level becomes.
Formula = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
FORMULAS: dict[str, Formula] = {
    "sd3": (scaled_latents, sd3_velocity, lambda uniform: shifted(uniform, 3.0)),
    "flux": (scaled_latents, flux_velocity, lambda uniform: uniform),
    "z_image": (scaled_latents, z_image_velocity, lambda uniform: shifted(uniform, 3.0)),
    "flux2": (flux2_latents, flux2_velocity, lambda uniform: shifted(uniform, np.exp(MU_FLUX2))),
    "qwen_image": (qwen_latents, qwen_velocity, lambda uniform: shifted(uniform, np.exp(MU_QWEN))),
    "sana": (sana_latents, sana_velocity, lambda uniform: shifted(uniform, 3.0)),
}


def test_every_family_of_flow_matching_has_its_formula() -> None:
    assert FORMULAS.keys() == FLOW_FAMILIES.keys()


@pytest.mark.parametrize("name", FORMULAS)
@torch.no_grad()
def test_the_loss_is_that_of_diffusers_script(name: str, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    FLOW_FAMILIES[name](tmp_path / "model", tiny_pipeline_dir)
    model = ModelConfig(name=str(tmp_path / "model"))
    family, pipeline = open_family(model), load_pipeline(model, "cpu")
    encoders = family.load_encoders("cpu")
    batch = encoders.encode_images(IMAGES) | encoders.encode_prompts(PROMPTS, 64, 48)
    batch["latent_std"] = torch.zeros_like(batch["latent_std"])
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    errors = family.errors(family.load_denoiser(), batch, generators, LossSettings(guidance_scale=3.5))

    latents_of, velocity_of, noise_level_of = FORMULAS[name]
    latents = latents_of(pipeline)
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    _, noise = (torch.cat([torch.randn(1, *latents.shape[1:], generator=draw) for draw in draws]) for _ in range(2))
    sigmas = noise_level_of(torch.cat([torch.randn(1, generator=draw) for draw in draws]).sigmoid()).float()
    noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    velocity = velocity_of(pipeline, noisy, 1000 * sigmas)
    expected = (velocity.float() - (noise - latents)).pow(2).reshape(2, -1).mean(1)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-6)
