"""Flow matching, the training of SD3 and FLUX: a transformer predicts the velocity from latents to noise (2403.03206, section 3).

Shapes: N examples, C latent channels, h x w latent pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import Batch
from selma_ray.models.locate import LocatedModel
from selma_ray.models.parts import (
    latent_shape,
    load_config,
    load_denoiser,
    load_errors,
    noise_like,
    sample_latents,
    squared_errors,
)

__all__ = ["FlowMatching"]


class FlowMatching(ABC):
    """A pipeline whose transformer was trained by rectified flow, at noise levels from a logit-normal distribution."""

    predictions_per_step = 2
    transformer_class: ClassVar[Any]
    tokens: ClassVar[int]
    """Length of an encoded prompt."""

    def __init__(self, model: ModelConfig, located: LocatedModel) -> None:
        self.model = model
        self.located = located

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer alone, in fp32."""
        return load_denoiser(self.model, self.located, self.transformer_class, "transformer")

    def empty_denoiser(self) -> Any:
        """Return the transformer as its configuration says, on the default device, without its weights."""
        return self.transformer_class.from_config(self._transformer)

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N."""
        latents = latent_shape(self._autoencoder, height_px, width_px)
        return {
            "latent_mean": latents,
            "latent_std": latents,
            "text_NTD": (self.tokens, self._transformer["joint_attention_dim"]),
            "pooled_NP": (self._transformer["pooled_projection_dim"],),
        }

    @cached_property
    def _transformer(self) -> Any:
        return load_config(self.model, self.located, self.transformer_class, "transformer")

    @cached_property
    def _autoencoder(self) -> Any:
        return load_config(self.model, self.located, AutoencoderKL, "vae")

    @cached_property
    def latent_scale_and_shift(self) -> tuple[float, float]:
        """What turns the autoencoder's latents into the denoiser's: (z - shift) * scale."""
        return float(self._autoencoder["scaling_factor"]), float(self._autoencoder.get("shift_factor") or 0.0)

    @cached_property
    def schedule(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler of the model's folder."""
        with load_errors(self.model, "the scheduler"):
            return FlowMatchEulerDiscreteScheduler.from_pretrained(
                self.located.path, subfolder="scheduler", revision=self.model.revision
            )

    def errors(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        min_snr_gamma: float | None = None,
    ) -> torch.Tensor:
        """Return each example's mean squared error of the velocity noise - latents (N, fp32), every noise level weighed the same.

        All randomness of an example comes from its own generator, so its error does not depend on the batch it is in. Raises
        ConfigError for `min_snr_gamma`, which is defined for diffusion alone.
        """
        if min_snr_gamma is not None:
            raise ConfigError(
                f"experts.min_snr_gamma must be left out for {self.model.name}, which is trained by flow matching, got {min_snr_gamma:g}"
            )
        latents_NChw = sample_latents(batch, generators, *self.latent_scale_and_shift)
        noise_NChw = noise_like(latents_NChw, generators)
        sigmas_N = self._sample_sigmas(generators).to(latents_NChw.device)
        sigmas_N111 = sigmas_N[:, None, None, None]
        noisy_NChw = (1.0 - sigmas_N111) * latents_NChw + sigmas_N111 * noise_NChw
        dtype = next(denoiser.parameters()).dtype
        conditioning = {name: tensor.to(dtype) for name, tensor in batch.items()}
        velocity_NChw = self._velocity(denoiser, noisy_NChw.to(dtype), sigmas_N, conditioning)
        return squared_errors(velocity_NChw, noise_NChw - latents_NChw)

    @abstractmethod
    def _velocity(
        self, denoiser: torch.nn.Module, noisy_NChw: torch.Tensor, sigmas_N: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Return the transformer's prediction (NChw)."""

    def _sample_sigmas(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Draw noise levels in (0, 1), logit-normal and then shifted as the scheduler's are (2403.03206, section 5.3.2)."""
        uniform_N = torch.cat([torch.randn(1, generator=generator) for generator in generators]).sigmoid()
        shift = 1.0 if self.schedule.config.use_dynamic_shifting else self.schedule.config.shift
        return shift * uniform_N / (1.0 + (shift - 1.0) * uniform_N)
