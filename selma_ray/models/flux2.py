"""FLUX.2 klein: three layers of a language model's states, latents by the autoencoder's own statistics, positions on four axes.

Latents are those of 2 x 2 of the autoencoder's, as channels of one position, less their mean and over their standard deviation: both are
weights of the autoencoder, which a trainer does not hold, so that encoded examples have them applied.

Shapes: N examples or images, T text tokens, D text width, C channels, h x w positions of 2 x 2 latents.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.config import SamplingConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline, load_errors

__all__ = ["Flux2Klein", "Flux2KleinEncoders", "Flux2KleinPredictor"]

_PATCH = 2  # latents on each side of a position


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    """Return the states of every token up to the longest text's length, what fills a text up included: the transformer reads it too."""
    return {"text_NTD": pipeline.encode_prompt(texts)[0]}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    device, text_NTD = noisy_NChw.device, conditioning["text_NTD"]
    packed = denoiser(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy_NChw),
        timestep=(timesteps_N / 1000).to(noisy_NChw.dtype),
        guidance=None,
        encoder_hidden_states=text_NTD,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(text_NTD[:1]).to(device),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy_NChw[:1]).to(device),
        return_dict=False,
    )[0]
    return packed.transpose(1, 2).reshape(noisy_NChw.shape)


def _statistics(autoencoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of a position's latents, each 1 x C x 1 x 1."""
    deviation_C = torch.sqrt(autoencoder.bn.running_var + autoencoder.config.batch_norm_eps)
    return autoencoder.bn.running_mean.view(1, -1, 1, 1), deviation_C.view(1, -1, 1, 1)


class Flux2Klein(FlowMatching):
    """A Flux2KleinPipeline's parts, each loaded from its own sub-folder when it is needed."""

    transformer_class = Flux2Transformer2DModel
    autoencoder_class = AutoencoderKLFlux2
    tokens = 512
    token_latents = 1
    shifts_by_size = True
    _denoise = staticmethod(_denoise)

    @cached_property
    def predictions_per_step(self) -> int:  # type: ignore[override]
        """Calls of the transformer in a guided sampling step: 1 where it was distilled for few steps, which knows no guidance."""
        with load_errors(self.model, "the pipeline's index"):
            index = DiffusionPipeline.load_config(self.located.path, revision=self.model.revision)
        return 1 if index.get("is_distilled") else 2

    def load_encoders(self, device: torch.device | str) -> "Flux2KleinEncoders":
        """Load the autoencoder and the language model in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, Flux2KleinPipeline, device, transformer=None)
        return Flux2KleinEncoders(pipeline, _encode_texts)

    @cached_property
    def latent_scale_and_shift(self) -> tuple[float, float]:
        """Nothing is left to scale: the statistics are applied to encoded examples."""
        return 1.0, 0.0

    def _latent_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        channels, height, width = self.decoded_shape(height_px, width_px)
        return channels * _PATCH**2, height // _PATCH, width // _PATCH

    def _text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text_NTD": (self.tokens, self._transformer["joint_attention_dim"])}


class Flux2KleinEncoders(PipelineEncoders):
    """An autoencoder whose latents have statistics, and a language model."""

    def _posterior(self, pixels_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self._pipeline.vae.encode(pixels_N3HW).latent_dist
        mean_NChw, std_NChw = (Flux2KleinPipeline._patchify_latents(each) for each in (posterior.mean, posterior.std))
        mean_1C11, deviation_1C11 = _statistics(self._pipeline.vae)
        return (mean_NChw - mean_1C11) / deviation_1C11, std_NChw / deviation_1C11


class Flux2KleinPredictor(FlowPredictor):
    """A Flux2KleinPipeline, with classifier-free guidance unless it was distilled for few steps."""

    position_latents = _PATCH
    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    @staticmethod
    def call_arguments(pipeline: Any, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """Return the guidance, and what it starts from, which the pipeline takes embedded alone."""
        negative: dict[str, Any] = {}
        if sampling.negative_prompt:
            negative = {"negative_prompt_embeds": pipeline.encode_prompt([sampling.negative_prompt] * count)[0]}
        return {"guidance_scale": sampling.guidance_scale, **negative}

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the prompts, and the negative prompts where guidance needs them."""
        conditions = super().encode(drawings)
        if not self._pipeline.config.is_distilled:
            return conditions
        return [Conditions(each.positive, None) for each in conditions]

    def rows_of(self, drawing: Drawing) -> int:
        """Return how many rows of a step an image takes: one of a model that was distilled for few steps."""
        return 1 if self._pipeline.config.is_distilled else super().rows_of(drawing)

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for a size that has no whole patches."""
        position_px = self._pipeline.vae_scale_factor * _PATCH
        positions = (drawing.height_px // position_px) * (drawing.width_px // position_px)
        schedule: dict[str, Any] = {"mu": compute_empirical_mu(positions, drawing.steps)}
        if not getattr(self._pipeline.scheduler.config, "use_flow_sigmas", False):
            schedule["sigmas"] = np.linspace(1.0, 1 / drawing.steps, drawing.steps)
        return self._course(drawing, self.denoiser.config.in_channels, _PATCH, schedule)

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the velocity for each row; timesteps are rounded to the model's precision first, as the pipeline rounds them."""
        return super().predict(inputs_NChw, timesteps_N.to(self._dtype), conditions)

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the most likely latents, as the family's own pipelines start from, less their mean and over their deviation."""
        vae = self._pipeline.vae
        latents_NChw = Flux2KleinPipeline._patchify_latents(vae.encode(pixels_N3HW).latent_dist.mode())
        mean_1C11, deviation_1C11 = (each.to(latents_NChw) for each in _statistics(vae))
        return (latents_NChw - mean_1C11) / deviation_1C11

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        mean_1C11, deviation_1C11 = (each.to(latents_NChw) for each in _statistics(vae))
        latents_NChw = Flux2KleinPipeline._unpatchify_latents(latents_NChw * deviation_1C11 + mean_1C11)
        return vae.decode(latents_NChw, return_dict=False)[0]
