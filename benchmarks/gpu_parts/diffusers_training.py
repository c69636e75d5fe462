"""A LoRA training step in the form of diffusers' scripts, to be measured against: frozen weights in half precision, the adapter in
fp32 under autocast, AdamW, and the autoencoder and the text encoders run at every step.

That is what its scripts for Stable Diffusion XL, 3 and FLUX do with a data set of captioned images. `encode=False` is what they do with
cached latents and one fixed prompt: the batch is there before.
"""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from benchmarks.gpu_parts.examples import CAPTIONS, random_batch
from benchmarks.gpu_parts.pipelines import Subject, random_part, random_pipeline
from selma_ray.models.family import open_family
from selma_ray.models.parts import DENOISERS, DTYPES, denoiser_of

__all__ = ["diffusers_steps"]

_TRAINING_GUIDANCE = 3.5

Batch = Mapping[str, torch.Tensor]


def diffusers_steps(subject: Subject, device: torch.device, *, encode: bool) -> Generator[float, None, None]:
    """Yield the loss of one step after another; close it to free its models."""
    dtype, config = DTYPES[subject.experts.precision], subject.experts
    if encode:
        pipeline = random_pipeline(subject, device)
        denoiser: Any = denoiser_of(pipeline)
        batch = _encoding(pipeline, subject, device)
    else:
        folder = Path(subject.model.name)
        name = next(each for each in DENOISERS if (folder / each).is_dir())
        denoiser = random_part(folder, name, dtype, device)
        encoded = {key: each.to(device) for key, each in random_batch(subject, config.batch_size).items()}
        scale, shift = _scale(subject)
        drawn = (encoded["latent_mean"] - shift) * scale
        batch = lambda: (drawn, encoded)  # noqa: E731
    denoiser.to(dtype).requires_grad_(False)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets), init_lora_weights="gaussian"
    )  # fmt: skip
    denoiser.add_adapter(lora)
    cast_training_params(denoiser, dtype=torch.float32)
    denoiser.train()
    parameters = [each for each in denoiser.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    while True:
        latents_NChw, told = batch()
        with torch.autocast(device.type, dtype):
            loss = _loss(denoiser, latents_NChw.to(dtype), {key: each.to(dtype) for key, each in told.items()}, subject)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.item()


def _encoding(pipeline: Any, subject: Subject, device: torch.device) -> Callable[[], tuple[torch.Tensor, Batch]]:
    """Return what encodes a batch of images and captions; SDXL's autoencoder in fp32, as its script has it."""
    scale, shift = _scale(subject)
    vae, count = pipeline.vae, subject.experts.batch_size
    if subject.family == "sdxl":
        vae.to(torch.float32)
    shape = (count, 3, subject.sampling.height_px, subject.sampling.width_px)
    pixels_N3HW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    texts = [CAPTIONS[index % len(CAPTIONS)] for index in range(count)]

    @torch.no_grad()
    def encode() -> tuple[torch.Tensor, Batch]:
        posterior = vae.encode(pixels_N3HW.to(device, vae.dtype)).latent_dist
        return (posterior.sample() - shift) * scale, _texts(pipeline, texts, subject, device)

    return encode


def _texts(pipeline: Any, texts: list[str], subject: Subject, device: torch.device) -> Batch:
    if subject.family == "flux":
        text_NTD, pooled_NP, _ = pipeline.encode_prompt(texts, None, device=device)
        return {"text_NTD": text_NTD, "pooled_NP": pooled_NP}
    options = {"prompt_3": None} if subject.family == "sd3" else {}
    text_NTD, _, pooled_NP, _ = pipeline.encode_prompt(
        texts, prompt_2=None, device=device, do_classifier_free_guidance=False, **options
    )
    if subject.family == "sd3":
        return {"text_NTD": text_NTD, "pooled_NP": pooled_NP}
    height_px, width_px = subject.sampling.height_px, subject.sampling.width_px
    time_ids_N6 = torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]] * len(texts), device=device)
    return {"text_NTD": text_NTD, "pooled_NP": pooled_NP, "time_ids_N6": time_ids_N6}


def _loss(denoiser: Any, latents_NChw: torch.Tensor, told: Batch, subject: Subject) -> torch.Tensor:
    """Return the mean squared error of the noise (SDXL) or of the velocity from latents to noise."""
    count, device = len(latents_NChw), latents_NChw.device
    noise_NChw = torch.randn_like(latents_NChw)
    if subject.family == "sdxl":
        schedule: Any = open_family(subject.model).schedule  # type: ignore[attr-defined]
        timesteps_N = torch.randint(schedule.config.num_train_timesteps, (count,), device=device)
        predicted_NChw = denoiser(
            schedule.add_noise(latents_NChw, noise_NChw, timesteps_N),
            timesteps_N,
            told["text_NTD"],
            added_cond_kwargs={"text_embeds": told["pooled_NP"], "time_ids": told["time_ids_N6"]},
            return_dict=False,
        )[0]
        return torch.nn.functional.mse_loss(predicted_NChw.float(), noise_NChw.float())
    sigmas_N = torch.randn(count, device=device).sigmoid().to(latents_NChw.dtype)
    mixed_NChw = torch.lerp(latents_NChw, noise_NChw, sigmas_N[:, None, None, None])
    if subject.family == "sd3":
        predicted_NChw = denoiser(
            hidden_states=mixed_NChw, timestep=sigmas_N * 1000, encoder_hidden_states=told["text_NTD"],
            pooled_projections=told["pooled_NP"], return_dict=False,
        )[0]  # fmt: skip
    else:
        predicted_NChw = _flux(denoiser, mixed_NChw, sigmas_N, told)
    return torch.nn.functional.mse_loss(predicted_NChw.float(), (noise_NChw - latents_NChw).float())


def _flux(denoiser: Any, mixed_NChw: torch.Tensor, sigmas_N: torch.Tensor, told: Batch) -> torch.Tensor:
    from diffusers import FluxPipeline

    count, channels, height, width = mixed_NChw.shape
    device, dtype = mixed_NChw.device, mixed_NChw.dtype
    packed = denoiser(
        hidden_states=FluxPipeline._pack_latents(mixed_NChw, count, channels, height, width),
        timestep=sigmas_N,
        guidance=torch.full((count,), _TRAINING_GUIDANCE, device=device) if denoiser.config.guidance_embeds else None,
        pooled_projections=told["pooled_NP"],
        encoder_hidden_states=told["text_NTD"],
        txt_ids=torch.zeros(told["text_NTD"].shape[1], 3, device=device, dtype=dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8)


def _scale(subject: Subject) -> tuple[float, float]:
    family: Any = open_family(subject.model)
    if subject.family == "sdxl":
        return family.latent_scale, 0.0
    return family.latent_scale_and_shift
