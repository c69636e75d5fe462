"""Flow matching: a transformer predicts the velocity from latents to noise (2403.03206, section 3).

Shapes: N examples or images, C latent channels, h x w latent pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from selma_ray.errors import ConfigError, DrawingError
from selma_ray.models.conditions import Condition
from selma_ray.models.config import ModelConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.family import DEFAULT_LOSS, Batch, LossSettings
from selma_ray.models.locate import LocatedModel
from selma_ray.models.noising import Noised
from selma_ray.models.parts import (
    autoencoder_config,
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

__all__ = ["FlowMatching", "FlowPredictor", "shift_of_size"]

_ANY_SIZE_PX = 1024


class FlowMatching(ABC):
    """A pipeline whose transformer was trained by rectified flow, at noise levels from a logit-normal distribution."""

    predictions_per_step = 2
    guides_above: ClassVar[float] = 1.0
    upcasts_autoencoder = False
    transformer_class: ClassVar[Any]
    autoencoder_class: ClassVar[Any] = AutoencoderKL
    tokens: ClassVar[int]
    """Length of an encoded prompt, or of the longest."""
    token_latents: ClassVar[int] = 2
    """Latents of an example on each side of what the transformer sees as one."""
    shifts_by_size: ClassVar[bool] = False
    """Whether noise levels of training follow the image's size where the scheduler's do; diffusers' scripts lose that shift."""

    def __init__(self, model: ModelConfig, located: LocatedModel) -> None:
        self.model = model
        self.located = located

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Load the transformer alone."""
        return load_denoiser(self.model, self.located, self.transformer_class, "transformer", dtype)

    def empty_denoiser(self) -> Any:
        """Return the transformer as its configuration says, on the default device, without its weights."""
        return self.transformer_class.from_config(self._transformer)

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N."""
        latents = self._latent_shape(height_px, width_px)
        return {"latent_mean": latents, "latent_std": latents, **self._text_shapes()}

    def decoded_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape, without N, of what the autoencoder turns into an image."""
        return latent_shape(self._autoencoder, height_px, width_px)

    @property
    def unit_px(self) -> int:
        """Return what both sides of an image must divide by: they are whole patches."""
        return _ANY_SIZE_PX // self._latent_shape(_ANY_SIZE_PX, _ANY_SIZE_PX)[1] * self.token_latents

    def _latent_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape of an example's latents."""
        return self.decoded_shape(height_px, width_px)

    def _text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded prompt, without N."""
        return {
            "text_NTD": (self.tokens, self._transformer["joint_attention_dim"]),
            "pooled_NP": (self._transformer["pooled_projection_dim"],),
        }

    @cached_property
    def _transformer(self) -> Any:
        return load_config(self.model, self.located, self.transformer_class, "transformer")

    @cached_property
    def _autoencoder(self) -> Any:
        return autoencoder_config(self.model, self.located, self.autoencoder_class)

    @cached_property
    def latent_scale_and_shift(self) -> tuple[float, float]:
        """What turns the autoencoder's latents into the denoiser's: (z - shift) * scale."""
        return float(self._autoencoder["scaling_factor"]), float(self._autoencoder.get("shift_factor") or 0.0)

    def drawn_example(self, latents_NChw: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU) of latents that were drawn: those, without a spread."""
        return without_spread(latents_NChw, *self.latent_scale_and_shift)

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
        settings: LossSettings = DEFAULT_LOSS,
    ) -> torch.Tensor:
        """Return each example's mean squared error of the velocity noise - latents (N, fp32), every noise level weighed the same."""
        return self.errors_by_level(denoiser, batch, generators, settings)[0]

    def errors_by_level(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        settings: LossSettings = DEFAULT_LOSS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each example's mean squared error of the velocity noise - latents, and its noise level (both N).

        All randomness of an example comes from its own generator, so its error does not depend on the batch it is in. Raises
        ConfigError for `settings.min_snr_gamma`, which is defined for diffusion alone.
        """
        noised = self.noised(batch, generators, settings)
        return squared_errors(self.predict(denoiser, noised), noised.target), noised.clean_scale

    def noised(
        self, batch: Batch, generators: Sequence[torch.Generator], settings: LossSettings = DEFAULT_LOSS
    ) -> Noised:
        """Return each example at a noise level of the model's own distribution; all its randomness comes from its own generator."""
        if settings.min_snr_gamma is not None:
            raise ConfigError(
                f"experts.min_snr_gamma must be left out for {self.model.name}, which is trained by flow matching, "
                f"got {settings.min_snr_gamma:g}"
            )
        latents_NChw = sample_latents(batch, generators, *self.latent_scale_and_shift)
        noise_NChw = noise_like(latents_NChw, generators)
        sigmas_N = self._sample_sigmas(generators, latents_NChw.shape[2:]).to(latents_NChw.device)
        sigmas_N111 = sigmas_N[:, None, None, None]
        noisy_NChw = (1.0 - sigmas_N111) * latents_NChw + sigmas_N111 * noise_NChw
        timesteps_N = sigmas_N * self.schedule.config.num_train_timesteps
        conditioning = self._told(dict(batch), settings)
        return Noised(noisy_NChw, timesteps_N, conditioning, noise_NChw - latents_NChw, sigmas_N)

    def predict(self, denoiser: torch.nn.Module, noised: Noised) -> torch.Tensor:
        """Return the transformer's velocity of each noised example (NChw), in its precision."""
        dtype = next(denoiser.parameters()).dtype
        conditioning = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in noised.conditioning.items()
        }
        return self._denoise(denoiser, noised.noisy.to(dtype), noised.timesteps, conditioning)

    @staticmethod
    @abstractmethod
    def _denoise(
        denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
    ) -> torch.Tensor:
        """Call the transformer; returns the velocity (NChw)."""

    def _told(self, conditioning: dict[str, torch.Tensor], settings: LossSettings) -> Condition:
        """Return what the transformer is told in training, given what was encoded."""
        return conditioning

    def _sample_sigmas(self, generators: Sequence[torch.Generator], size_hw: Sequence[int]) -> torch.Tensor:
        """Draw noise levels in (0, 1), logit-normal and then shifted as the scheduler's are (2403.03206, section 5.3.2)."""
        uniform_N = torch.cat([torch.randn(1, generator=generator) for generator in generators]).sigmoid()
        config = self.schedule.config
        if config.use_dynamic_shifting and self.shifts_by_size:
            tokens = (size_hw[0] // self.token_latents) * (size_hw[1] // self.token_latents)
            return self.schedule.time_shift(shift_of_size(config, tokens), 1.0, uniform_N)
        shift = 1.0 if config.use_dynamic_shifting else config.get("flow_shift", config.shift)
        return shift * uniform_N / (1.0 + (shift - 1.0) * uniform_N)


class FlowPredictor(PipelinePredictor):
    """What families of flow matching do alike: a velocity's course, and the autoencoder's shift."""

    latents_dtype: ClassVar[torch.dtype | None] = None
    """Precision of the course; None is the denoiser's."""

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        latents_NChw = latents_NChw / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents_NChw, return_dict=False)[0]

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self._pipeline.vae
        return (
            vae.encode(pixels_N3HW).latent_dist.sample(generator) - vae.config.shift_factor
        ) * vae.config.scaling_factor

    def _course(self, drawing: Drawing, channels: int, patch: int, schedule: Mapping[str, Any]) -> Course:
        """Draw the initial noise as diffusers' pipelines do; raises DrawingError for a size that has no whole patches."""
        unit_px = self._pipeline.vae_scale_factor * patch
        if drawing.height_px % unit_px or drawing.width_px % unit_px:
            raise DrawingError(
                f"size must have sides that are multiples of {unit_px} with this model, got {drawing.width_px}x{drawing.height_px}",
                "size_px",
            )
        scale = self._pipeline.vae_scale_factor * self.position_latents
        shape_NChw = (1, channels, drawing.height_px // scale, drawing.width_px // scale)
        dtype = self.latents_dtype or self._dtype
        return Course(
            self._pipeline.scheduler, drawing.steps, drawing.seed, shape_NChw, dtype, self._device, schedule,
            self._start_of(drawing),
        )  # fmt: skip

    def _shift(self, drawing: Drawing, patch: int, default_most: float) -> float:
        """Return how far noise levels are shifted for an image of this size (2403.03206, section 5.3.2)."""
        unit_px = self._pipeline.vae_scale_factor * patch
        tokens = (drawing.height_px // unit_px) * (drawing.width_px // unit_px)
        return shift_of_size(self._pipeline.scheduler.config, tokens, default_most)


def shift_of_size(config: Mapping[str, Any], tokens: int, default_most: float = 1.15) -> float:
    """Return how far a scheduler shifts the noise levels of an image of so many tokens (2403.03206, section 5.3.2)."""
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", default_most),
    )
