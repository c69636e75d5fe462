"""Stable Diffusion 1.x and 2.x, and every model in their format: one CLIP text encoder, a UNet, epsilon or v-prediction.

Shapes: N examples or images, H x W pixels, C latent channels, h x w latent pixels, T text tokens, D text width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextConfig

from selma_ray.errors import ConfigError
from selma_ray.models.conditions import Condition
from selma_ray.models.config import ModelConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.family import DEFAULT_LOSS, Batch, LossSettings
from selma_ray.models.locate import LocatedModel
from selma_ray.models.noising import Noised
from selma_ray.models.parts import (
    autoencoder_config,
    encoding_pipeline,
    latent_shape,
    load_config,
    load_denoiser,
    load_errors,
    noise_like,
    sample_latents,
    squared_errors,
    without_spread,
)
from selma_ray.models.predicting import PipelinePredictor

__all__ = ["StableDiffusion", "StableDiffusionEncoders", "StableDiffusionPredictor"]

_ANY_SIZE_PX = 1024


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    """Return the last hidden states, padded to the encoder's length: the denoiser attends to the padding at sampling time too."""
    return {"text_NTD": pipeline.encode_prompt(texts, pipeline._execution_device, 1, False)[0]}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    return denoiser(noisy_NChw, timesteps_N, encoder_hidden_states=conditioning["text_NTD"], return_dict=False)[0]


class StableDiffusion:
    """A StableDiffusionPipeline's parts, each loaded from its own sub-folder when it is needed."""

    predictions_per_step = 2
    guides_above = 1.0
    upcasts_autoencoder = False
    _denoise = staticmethod(_denoise)

    def __init__(self, model: ModelConfig, located: LocatedModel) -> None:
        self.model = model
        self.located = located

    def load_encoders(self, device: torch.device | str) -> "StableDiffusionEncoders":
        """Load the autoencoder and the text encoder in the model's precision, onto a device; no UNet is read."""
        pipeline = encoding_pipeline(
            self.model, self.located, StableDiffusionPipeline, device, unet=None, safety_checker=None
        )
        return StableDiffusionEncoders(pipeline, _encode_texts)

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Load the UNet alone."""
        return load_denoiser(self.model, self.located, UNet2DConditionModel, "unet", dtype)

    def empty_denoiser(self) -> Any:
        """Return the UNet as its configuration says, on the default device, without its weights."""
        return UNet2DConditionModel.from_config(load_config(self.model, self.located, UNet2DConditionModel, "unet"))

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N."""
        unet = load_config(self.model, self.located, UNet2DConditionModel, "unet")
        latents = latent_shape(self._autoencoder, height_px, width_px)
        with load_errors(self.model, "the configuration of text_encoder"):
            text = CLIPTextConfig.from_pretrained(
                self.located.path, subfolder="text_encoder", revision=self.model.revision or "main"
            )
        tokens = text.max_position_embeddings * self.model.text_chunks
        return {"latent_mean": latents, "latent_std": latents, "text_NTD": (tokens, unet["cross_attention_dim"])}

    def decoded_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape, without N, of what the autoencoder turns into an image."""
        return latent_shape(self._autoencoder, height_px, width_px)

    @property
    def unit_px(self) -> int:
        """Return what both sides of an image must divide by: they are whole latents."""
        return _ANY_SIZE_PX // self.decoded_shape(_ANY_SIZE_PX, _ANY_SIZE_PX)[1]

    @cached_property
    def latent_scale(self) -> float:
        """Factor from the autoencoder's latents to the denoiser's."""
        return float(self._autoencoder["scaling_factor"])

    def drawn_example(self, latents_NChw: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU) of latents that were drawn: those, without a spread."""
        return without_spread(latents_NChw, self.latent_scale)

    @cached_property
    def _autoencoder(self) -> Any:
        return autoencoder_config(self.model, self.located, AutoencoderKL)

    @cached_property
    def schedule(self) -> DDPMScheduler:
        """The noise schedule that the model was trained with; whatever sampler its folder names is read as DDPM."""
        with load_errors(self.model, "the scheduler"):
            schedule = DDPMScheduler.from_pretrained(
                self.located.path, subfolder="scheduler", revision=self.model.revision
            )
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction_type of {self.model.name}'s scheduler must be epsilon or v_prediction, "
                f"got {schedule.config.prediction_type!r}; take another model"
            )
        return schedule

    def errors(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        settings: LossSettings = DEFAULT_LOSS,
    ) -> torch.Tensor:
        """Return each example's mean squared error of the prediction at a uniform timestep (N, fp32)."""
        return self.errors_by_level(denoiser, batch, generators, settings)[0]

    def errors_by_level(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        settings: LossSettings = DEFAULT_LOSS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each example's mean squared error of the prediction at a uniform timestep, and that timestep's share of all (both N).

        All randomness of an example comes from its own generator, so its error does not depend on the batch it is in. With
        `settings.min_snr_gamma`, each example's error is weighted by min(SNR, gamma) as in 2303.09556, section 3.4.
        """
        noised = self.noised(batch, generators, settings)
        error_N = squared_errors(self.predict(denoiser, noised), noised.target)
        if settings.min_snr_gamma is not None:
            error_N = self._min_snr_weights(noised.timesteps, settings.min_snr_gamma) * error_N
        return error_N, noised.timesteps / self.schedule.config.num_train_timesteps

    def noised(
        self, batch: Batch, generators: Sequence[torch.Generator], settings: LossSettings = DEFAULT_LOSS
    ) -> Noised:
        """Return each example with noise on it at a uniform timestep; all its randomness comes from its own generator."""
        latents_NChw = sample_latents(batch, generators, self.latent_scale)
        noise_NChw = noise_like(latents_NChw, generators)
        timesteps_N = self._sample_timesteps(generators, latents_NChw.device)
        noisy_NChw = self.schedule.add_noise(latents_NChw, noise_NChw, timesteps_N)
        signal_N = self.schedule.alphas_cumprod.to(latents_NChw.device)[timesteps_N]
        if self.schedule.config.prediction_type == "epsilon":
            return Noised(noisy_NChw, timesteps_N, batch, noise_NChw, ((1 - signal_N) / signal_N).sqrt())
        target_NChw = self.schedule.get_velocity(latents_NChw, noise_NChw, timesteps_N)
        return Noised(noisy_NChw, timesteps_N, batch, target_NChw, (1 - signal_N).sqrt())

    def predict(self, denoiser: torch.nn.Module, noised: Noised) -> torch.Tensor:
        """Return the UNet's prediction of each noised example (NChw), in its precision."""
        dtype = next(denoiser.parameters()).dtype
        conditioning = {name: tensor.to(dtype) for name, tensor in noised.conditioning.items()}
        return self._denoise(denoiser, noised.noisy.to(dtype), noised.timesteps, conditioning)

    def _min_snr_weights(self, timesteps_N: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the weights that make the loss one of the clean latents' error times min(SNR, gamma)."""
        snr_N = compute_snr(self.schedule, timesteps_N)
        if self.schedule.config.prediction_type == "epsilon":
            return (gamma / snr_N).clamp(max=1)  # not min(SNR, gamma) / SNR, which is 0 / 0 at a terminal SNR of zero
        return snr_N.clamp(max=gamma) / (snr_N + 1)

    def _sample_timesteps(self, generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
        steps = self.schedule.config.num_train_timesteps
        return torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators]).to(device)


class StableDiffusionEncoders(PipelineEncoders):
    """An autoencoder and a CLIP text encoder."""

    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return the conditioning of each prompt in fp32, on the CPU; sizes do not matter to this family."""
        return {name: tensor.float() for name, tensor in super().encode_prompts(prompts).items()}


class StableDiffusionPredictor(PipelinePredictor):
    """A StableDiffusionPipeline, for epsilon and v prediction; raises ConfigError for a UNet distilled for guidance."""

    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise ConfigError(
                "the model to serve must not be distilled for guidance as latent consistency models are; serve the model it came from"
            )

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image as diffusers' pipeline draws it, and put what it starts from below."""
        scale = self._pipeline.vae_scale_factor
        shape_NChw = (1, self.denoiser.config.in_channels, drawing.height_px // scale, drawing.width_px // scale)
        return Course(
            self._pipeline.scheduler, drawing.steps, drawing.seed, shape_NChw, self._dtype, self._device,
            start=self._start_of(drawing),
        )  # fmt: skip

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self._pipeline.vae
        return vae.config.scaling_factor * vae.encode(pixels_N3HW).latent_dist.sample(generator)

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        return vae.decode(latents_NChw / vae.config.scaling_factor, return_dict=False)[0]
