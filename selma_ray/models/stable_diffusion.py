"""Stable Diffusion 1.x and 2.x, and every model in their format: one CLIP text encoder, a UNet, epsilon or v-prediction.

Shapes: N examples, H x W pixels, C latent channels, h x w latent pixels, T text tokens, D text width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextConfig

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import Batch
from selma_ray.models.locate import LocatedModel
from selma_ray.models.parts import (
    ImageEncoder,
    encoding_pipeline,
    latent_shape,
    load_config,
    load_denoiser,
    load_errors,
    noise_like,
    sample_latents,
    squared_errors,
)

__all__ = ["StableDiffusion", "StableDiffusionEncoders"]


class StableDiffusion:
    """A StableDiffusionPipeline's parts, each loaded from its own sub-folder when it is needed."""

    predictions_per_step = 2

    def __init__(self, model: ModelConfig, located: LocatedModel) -> None:
        self.model = model
        self.located = located

    def load_encoders(self) -> "StableDiffusionEncoders":
        """Load the autoencoder and the text encoder in the model's precision, on the best device; no UNet is read."""
        return StableDiffusionEncoders(
            encoding_pipeline(self.model, self.located, StableDiffusionPipeline, unet=None, safety_checker=None)
        )

    def load_denoiser(self) -> torch.nn.Module:
        """Load the UNet alone, in fp32."""
        return load_denoiser(self.model, self.located, UNet2DConditionModel, "unet")

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
        tokens = text.max_position_embeddings
        return {"latent_mean": latents, "latent_std": latents, "text_NTD": (tokens, unet["cross_attention_dim"])}

    @cached_property
    def latent_scale(self) -> float:
        """Factor from the autoencoder's latents to the denoiser's."""
        return float(self._autoencoder["scaling_factor"])

    @cached_property
    def _autoencoder(self) -> Any:
        return load_config(self.model, self.located, AutoencoderKL, "vae")

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
        min_snr_gamma: float | None = None,
    ) -> torch.Tensor:
        """Return each example's mean squared error of the prediction at a uniform timestep (N, fp32).

        All randomness of an example comes from its own generator, so its error does not depend on the batch it is in. With
        `min_snr_gamma`, each example's error is weighted by min(SNR, gamma) as in 2303.09556, section 3.4.
        """
        latents_NChw = sample_latents(batch, generators, self.latent_scale)
        noise_NChw = noise_like(latents_NChw, generators)
        timesteps_N = self._sample_timesteps(generators, latents_NChw.device)
        noisy_NChw = self.schedule.add_noise(latents_NChw, noise_NChw, timesteps_N)
        if self.schedule.config.prediction_type == "epsilon":
            target_NChw = noise_NChw
        else:
            target_NChw = self.schedule.get_velocity(latents_NChw, noise_NChw, timesteps_N)
        dtype = next(denoiser.parameters()).dtype
        conditioning = self._conditioning({name: tensor.to(dtype) for name, tensor in batch.items()})
        prediction_NChw = denoiser(noisy_NChw.to(dtype), timesteps_N, **conditioning, return_dict=False)[0]
        error_N = squared_errors(prediction_NChw, target_NChw)
        return error_N if min_snr_gamma is None else self._min_snr_weights(timesteps_N, min_snr_gamma) * error_N

    def _min_snr_weights(self, timesteps_N: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the weights that make the loss one of the clean latents' error times min(SNR, gamma)."""
        snr_N = compute_snr(self.schedule, timesteps_N)
        of_error_N = snr_N if self.schedule.config.prediction_type == "epsilon" else snr_N + 1
        return snr_N.clamp(max=gamma) / of_error_N

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """Return what the denoiser is told beside noisy latents and timesteps."""
        return {"encoder_hidden_states": batch["text_NTD"]}

    def _sample_timesteps(self, generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
        steps = self.schedule.config.num_train_timesteps
        return torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators]).to(device)


class StableDiffusionEncoders(ImageEncoder):
    """An autoencoder and a CLIP text encoder that encode one row at a time."""

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return `text_NTD`, the last hidden states of each prompt padded to the encoder's length, as the pipeline does.

        Padding is kept: the denoiser attends to it at sampling time too. Sizes do not matter to this family.
        """
        return {"text_NTD": torch.cat([self._encode_prompt(prompt) for prompt in prompts]).float().cpu()}

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt, which guidance starts from at sampling time."""
        return self.encode_prompts([""])

    def _encode_prompt(self, prompt: str) -> torch.Tensor:
        return self._pipeline.encode_prompt(prompt, self._pipeline.device, 1, do_classifier_free_guidance=False)[0]
