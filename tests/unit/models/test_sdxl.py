from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from tests.unit.models.tiny_sdxl import save_tiny_sdxl


@pytest.fixture(scope="module")
def sdxl_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    save_tiny_sdxl(folder, tiny_pipeline_dir)
    return folder


@pytest.fixture(scope="module")
def batch(sdxl_dir: Any) -> Any:
    encoders = open_family(ModelConfig(name=str(sdxl_dir))).load_encoders("cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    return encoders.encode_images(images) | encoders.encode_prompts(["two apples", "a cat"], 64, 48)


def test_conditioning_is_what_the_pipeline_makes(sdxl_dir: Any, batch: Any) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    text, _, pooled, _ = pipeline.encode_prompt(
        ["two apples", "a cat"], device="cpu", do_classifier_free_guidance=False
    )
    time_ids = pipeline._get_add_time_ids(
        (64, 48), (0, 0), (64, 48), dtype=torch.float32, text_encoder_projection_dim=24
    )
    torch.testing.assert_close(batch["text_NTD"], text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["pooled_NP"], pooled, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch["time_ids_N6"], time_ids.repeat(2, 1))


def test_loss_equals_the_formula(sdxl_dir: Any, batch: Any) -> None:
    family = open_family(ModelConfig(name=str(sdxl_dir)))
    unet = family.load_denoiser().eval()
    row = {name: tensor[:1] for name, tensor in batch.items()}
    draw = torch.Generator().manual_seed(5)
    latents = (row["latent_mean"] + row["latent_std"] * torch.randn(1, 4, 16, 12, generator=draw)) * 0.18215
    noise = torch.randn(1, 4, 16, 12, generator=draw)
    timestep = torch.randint(1000, (1,), generator=draw)
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timestep]
    noisy = kept.sqrt().float() * latents + (1 - kept).sqrt().float() * noise
    added = {"text_embeds": row["pooled_NP"], "time_ids": row["time_ids_N6"]}
    with torch.no_grad():
        prediction = unet(noisy, timestep, encoder_hidden_states=row["text_NTD"], added_cond_kwargs=added).sample
        loss = family.errors(unet, row, [torch.Generator().manual_seed(5)]).mean()
    torch.testing.assert_close(loss, ((prediction - noise) ** 2).mean(), rtol=1e-4, atol=1e-5)


def test_an_overflowing_autoencoder_is_kept_in_fp32(sdxl_dir: Any) -> None:
    encoders = open_family(ModelConfig(name=str(sdxl_dir), dtype="fp16")).load_encoders("cpu")
    assert encoders._pipeline.vae.dtype == torch.float32  # type: ignore[attr-defined]
    assert encoders._pipeline.text_encoder.dtype == torch.float16  # type: ignore[attr-defined]


def test_a_dropped_caption_is_what_guidance_starts_from(sdxl_dir: Any) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    _, text, _, pooled = pipeline.encode_prompt(["a cat"], device="cpu", do_classifier_free_guidance=True)
    empty = open_family(ModelConfig(name=str(sdxl_dir))).load_encoders("cpu").encode_no_caption()
    assert empty.keys() == {"text_NTD", "pooled_NP"}
    assert torch.equal(empty["text_NTD"], text)
    assert torch.equal(empty["pooled_NP"], pooled)
