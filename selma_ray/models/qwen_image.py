"""Qwen-Image: a language model's states of any length, guidance whose length is that of the prompt's prediction, a video's autoencoder.

Encoded examples have the mean and standard deviation of the autoencoder's latents applied, channel by channel.

Shapes: N examples or images, T text tokens, D text width, C latent channels, h x w latent pixels, F = 1 frame.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from selma_ray.errors import DrawingError
from selma_ray.models.conditions import Condition
from selma_ray.models.config import SamplingConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline

__all__ = ["QwenImage", "QwenImageEncoders", "QwenImagePredictor"]

_PATCH = 2
_MOST_TOKENS = 512  # of a prompt and the end of its template, whose beginning is dropped


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    text_NTD, mask_NT = pipeline.encode_prompt(texts, max_sequence_length=_MOST_TOKENS)
    if mask_NT is None:  # texts of one length
        mask_NT = torch.ones(text_NTD.shape[:2], device=text_NTD.device)
    return {"text_NTD": text_NTD, "mask_NT": mask_NT.bool()}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    count, channels, height, width = noisy_NChw.shape
    packed = denoiser(
        hidden_states=QwenImagePipeline._pack_latents(noisy_NChw, count, channels, height, width),
        timestep=(timesteps_N / 1000).to(noisy_NChw.dtype),
        encoder_hidden_states=conditioning["text_NTD"],
        encoder_hidden_states_mask=conditioning["mask_NT"].bool(),
        img_shapes=[[(1, height // _PATCH, width // _PATCH)]] * count,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(packed, height, width, 1)[:, :, 0]


def _statistics(autoencoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of the latents, each 1 x C x 1 x 1."""
    config = autoencoder.config
    return torch.tensor(config.latents_mean).view(1, -1, 1, 1), torch.tensor(config.latents_std).view(1, -1, 1, 1)


class QwenImage(FlowMatching):
    """A QwenImagePipeline's parts, each loaded from its own sub-folder when it is needed."""

    transformer_class = QwenImageTransformer2DModel
    autoencoder_class = AutoencoderKLQwenImage
    tokens = _MOST_TOKENS
    shifts_by_size = True
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> "QwenImageEncoders":
        """Load the autoencoder and the language model in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, QwenImagePipeline, device, transformer=None)
        return QwenImageEncoders(pipeline, _encode_texts)

    def decoded_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape, without N, of what the autoencoder turns into an image: a video of one frame."""
        channels, height, width = self._latent_shape(height_px, width_px)
        return channels, 1, height, width

    @cached_property
    def latent_scale_and_shift(self) -> tuple[float, float]:
        """Nothing is left to scale: the statistics are applied to encoded examples."""
        return 1.0, 0.0

    def _latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        scale = 2 ** len(self._autoencoder["temperal_downsample"])
        return self._autoencoder["z_dim"], height_px // scale, width_px // scale

    def _text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text_NTD": (self.tokens, self._transformer["joint_attention_dim"]), "mask_NT": (self.tokens,)}


class QwenImageEncoders(PipelineEncoders):
    """A video's autoencoder whose latents have statistics, and a language model."""

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of a space, which guidance starts from at sampling time."""
        return self.encode_prompts([QwenImagePredictor.unprompted])

    def _posterior(self, pixels_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self._pipeline.vae.encode(pixels_N3HW.unsqueeze(2)).latent_dist
        mean_1C11, deviation_1C11 = (each.to(posterior.mean) for each in _statistics(self._pipeline.vae))
        return (posterior.mean[:, :, 0] - mean_1C11) / deviation_1C11, posterior.std[:, :, 0] / deviation_1C11


class QwenImagePredictor(FlowPredictor):
    """A QwenImagePipeline, with classifier-free guidance that keeps the length of the prompt's prediction."""

    unprompted = " "
    texts_vary = True
    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    @staticmethod
    def call_arguments(pipeline: Any, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """Return the guidance, which the pipeline has under another name and only with a negative prompt."""
        if sampling.guidance_scale <= 1:
            return {"true_cfg_scale": 1.0}
        negative_prompt = sampling.negative_prompt or QwenImagePredictor.unprompted
        return {"true_cfg_scale": sampling.guidance_scale, "negative_prompt": [negative_prompt] * count}

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for a size that has no whole patches, and for a single step."""
        if drawing.steps == 1 and self._pipeline.scheduler.config.get("shift_terminal"):
            # The last noise level is stretched to a set one, which the first cannot be at the same time.
            raise DrawingError("1 step is not possible with this model; ask for more", "steps")
        sigmas = np.linspace(1.0, 1 / drawing.steps, drawing.steps)
        schedule = {"mu": self._shift(drawing, _PATCH, 1.15), "sigmas": sigmas}
        return self._course(drawing, self.denoiser.config.in_channels // _PATCH**2, _PATCH, schedule)

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the velocity for each row; timesteps are rounded to the model's precision first, as the pipeline rounds them."""
        return super().predict(inputs_NChw, timesteps_N.to(self._dtype), conditions)

    def guide(
        self, drawing: Drawing, predicted_NChw: torch.Tensor, unconditional_NChw: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction to follow: guided, and as long in every patch as the one of the prompt alone."""
        if unconditional_NChw is None:
            return predicted_NChw
        guided_NChw = super().guide(drawing, predicted_NChw, unconditional_NChw)
        factor_N1hw = _patch_norms(predicted_NChw) / _patch_norms(guided_NChw)
        return guided_NChw * factor_N1hw.repeat_interleave(_PATCH, -1).repeat_interleave(_PATCH, -2)

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self._pipeline.vae
        latents_NChw = vae.encode(pixels_N3HW.unsqueeze(2)).latent_dist.sample(generator)[:, :, 0]
        mean_1C11, deviation_1C11 = (each.to(latents_NChw) for each in _statistics(vae))
        return (latents_NChw - mean_1C11) / deviation_1C11

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        latents_NChw = latents_NChw.to(vae.dtype)
        mean_1C11, deviation_1C11 = (each.to(latents_NChw) for each in _statistics(vae))
        latents_NCFhw = (latents_NChw * deviation_1C11 + mean_1C11).unsqueeze(2)
        return vae.decode(latents_NCFhw, return_dict=False)[0][:, :, 0]


def _patch_norms(predicted_NChw: torch.Tensor) -> torch.Tensor:
    """Return the length of each patch of a prediction, N x 1 x h/2 x w/2."""
    count, channels, height, width = predicted_NChw.shape
    patches = predicted_NChw.view(count, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return torch.linalg.vector_norm(patches, dim=(1, 3, 5)).unsqueeze(1)
