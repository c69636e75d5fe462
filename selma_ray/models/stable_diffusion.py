"""Stable Diffusion 1.x and 2.x, and every model in their format: one CLIP text encoder, a UNet, epsilon or v-prediction.

Shapes: N examples, H x W pixels, C latent channels, h x w latent pixels, T text tokens, D text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import Batch
from selma_ray.models.locate import LocatedModel

__all__ = ["StableDiffusion", "StableDiffusionEncoders"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StableDiffusion:
    """A StableDiffusionPipeline's parts, each loaded from its own sub-folder when it is needed."""

    def __init__(self, model: ModelConfig, located: LocatedModel) -> None:
        self.model = model
        self.located = located

    def load_encoders(self) -> "StableDiffusionEncoders":
        """Load the autoencoder and the text encoder in the model's precision, on the best device; no UNet is read."""
        return StableDiffusionEncoders(self._encoding_pipeline(StableDiffusionPipeline, safety_checker=None))

    def load_denoiser(self) -> torch.nn.Module:
        """Load the UNet alone, in fp32."""
        with _load_errors(self.model, "the UNet"):
            return UNet2DConditionModel.from_pretrained(
                self.located.path,
                subfolder="unet",
                revision=self.model.revision,
                variant=self.model.variant,
                torch_dtype=torch.float32,
                use_safetensors=True,
            )

    @cached_property
    def latent_scale(self) -> float:
        """Factor from the autoencoder's latents to the denoiser's."""
        with _load_errors(self.model, "the autoencoder's config"):
            config = AutoencoderKL.load_config(self.located.path, subfolder="vae", revision=self.model.revision)
        return float(config["scaling_factor"])

    @cached_property
    def schedule(self) -> DDPMScheduler:
        """The noise schedule that the model was trained with; whatever sampler its folder names is read as DDPM."""
        with _load_errors(self.model, "the scheduler"):
            schedule = DDPMScheduler.from_pretrained(
                self.located.path, subfolder="scheduler", revision=self.model.revision
            )
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction_type of {self.model.name}'s scheduler must be epsilon or v_prediction, "
                f"got {schedule.config.prediction_type!r}; take another model"
            )
        return schedule

    def loss(self, denoiser: torch.nn.Module, batch: Batch, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Return the mean squared error of the prediction at uniform timesteps (scalar, fp32).

        All randomness of an example comes from its own generator, so its loss does not depend on the batch it is in.
        """
        latents_NChw = self._sample_latents(batch, generators)
        noise_NChw = _noise_like(latents_NChw, generators)
        timesteps_N = self._sample_timesteps(generators, latents_NChw.device)
        noisy_NChw = self.schedule.add_noise(latents_NChw, noise_NChw, timesteps_N)
        if self.schedule.config.prediction_type == "epsilon":
            target_NChw = noise_NChw
        else:
            target_NChw = self.schedule.get_velocity(latents_NChw, noise_NChw, timesteps_N)
        dtype = next(denoiser.parameters()).dtype
        conditioning = self._conditioning({name: tensor.to(dtype) for name, tensor in batch.items()})
        prediction_NChw = denoiser(noisy_NChw.to(dtype), timesteps_N, **conditioning, return_dict=False)[0]
        return torch.nn.functional.mse_loss(prediction_NChw.float(), target_NChw)

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """Return what the denoiser is told beside noisy latents and timesteps."""
        return {"encoder_hidden_states": batch["text_NTD"]}

    def _encoding_pipeline(self, pipeline_class: Any, **left_out: None) -> Any:
        """Return the model's pipeline without its UNet, on the best device."""
        with _load_errors(self.model, "the encoders"):
            pipeline = pipeline_class.from_pretrained(
                self.located.path,
                unet=None,
                scheduler=None,
                **left_out,
                revision=self.model.revision,
                variant=self.model.variant,
                torch_dtype=_DTYPES[self.model.dtype],
                use_safetensors=True,
            )
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def _sample_latents(self, batch: Batch, generators: Sequence[torch.Generator]) -> torch.Tensor:
        mean_NChw = batch["latent_mean"].float()
        return (mean_NChw + batch["latent_std"].float() * _noise_like(mean_NChw, generators)) * self.latent_scale

    def _sample_timesteps(self, generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
        steps = self.schedule.config.num_train_timesteps
        return torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators]).to(device)


class StableDiffusionEncoders:
    """An autoencoder and a CLIP text encoder that encode one row at a time.

    Row by row, so that what is cached for a row depends on that row alone, to the bit, whatever shard it came in.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        if pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # its activations overflow in fp16

    @torch.inference_mode()
    def encode_images(self, images_NHW3: np.ndarray) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU, unscaled) of uint8 images."""
        posteriors = [self._pipeline.vae.encode(self._pixels(image_HW3)).latent_dist for image_HW3 in images_NHW3]
        return {
            "latent_mean": torch.cat([posterior.mean for posterior in posteriors]).float().cpu(),
            "latent_std": torch.cat([posterior.std for posterior in posteriors]).float().cpu(),
        }

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return `text_NTD`, the last hidden states of each prompt padded to the encoder's length, as the pipeline does.

        Padding is kept: the denoiser attends to it at sampling time too. Sizes do not matter to this family.
        """
        return {"text_NTD": torch.cat([self._encode_prompt(prompt) for prompt in prompts]).float().cpu()}

    def _encode_prompt(self, prompt: str) -> torch.Tensor:
        return self._pipeline.encode_prompt(prompt, self._pipeline.device, 1, do_classifier_free_guidance=False)[0]

    def _pixels(self, image_HW3: np.ndarray) -> torch.Tensor:
        pixels_3HW = torch.from_numpy(np.array(image_HW3)).permute(2, 0, 1)
        return pixels_3HW[None].to(self._pipeline.device, self._pipeline.vae.dtype) / 127.5 - 1.0


def _noise_like(tensor: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal noise, drawn on the CPU example by example so that devices and batches do not matter."""
    return randn_tensor(tuple(tensor.shape), generator=list(generators), device=tensor.device, dtype=torch.float32)


@contextmanager
def _load_errors(model: ModelConfig, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"{part} of model.name {model.name} cannot be loaded ({reason}); give a diffusers folder"
        ) from None
