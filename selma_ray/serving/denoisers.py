"""Text-to-image families as the engine sees them: encode texts, predict one step for any mix of rows, decode latents.

Shapes: N rows or images, L tokens, D features of a token, C channels, H x W positions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.schedulers import Course

__all__ = ["Condition", "Conditions", "Denoiser", "StableDiffusionDenoiser", "denoiser_for"]

_CACHED_TEXTS = 256


@dataclass(frozen=True)
class Condition:
    """What one row of the denoiser's batch is told about the image: the embedded text."""

    text: torch.Tensor
    """1 x L x D."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of one request; `negative` is None where no guidance is asked for."""

    positive: Condition
    negative: Condition | None


class Denoiser(Protocol):
    """A text-to-image model, taken apart so that the rows of a step may stand at different timesteps."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the texts of each request."""
        ...

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request."""
        ...

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the model's prediction for each row."""
        ...

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Turn finished latents into RGB images."""
        ...


def denoiser_for(pipeline: Any) -> Denoiser:
    """Return the denoiser of a loaded pipeline; raises ConfigError for a family that cannot be served yet."""
    if type(pipeline) is StableDiffusionPipeline and pipeline.unet.config.time_cond_proj_dim is None:
        return StableDiffusionDenoiser(pipeline)
    raise ConfigError(f"the model to serve must be a StableDiffusionPipeline (1.x, 2.x), got {type(pipeline).__name__}")


class StableDiffusionDenoiser:
    """Stable Diffusion 1.x and 2.x, for epsilon and v prediction."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self._pipeline = pipeline
        self._device = pipeline._execution_device
        self._dtype = pipeline.text_encoder.dtype
        self._texts: OrderedDict[str, Condition] = OrderedDict()

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the prompts, and the negative prompts where guidance needs them; texts seen lately are remembered."""
        texts = [request.prompt for request in requests]
        texts += [request.negative_prompt for request in requests if _guided(request)]
        embedded = self._embedded(texts)
        return [
            Conditions(embedded[request.prompt], embedded[request.negative_prompt] if _guided(request) else None)
            for request in requests
        ]

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request as diffusers' pipeline draws it."""
        scale = self._pipeline.vae_scale_factor
        shape_NCHW = (1, self._pipeline.unet.config.in_channels, request.height_px // scale, request.width_px // scale)
        return Course(self._pipeline.scheduler, request.steps, request.seed, shape_NCHW, self._dtype, self._device)

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the UNet's prediction for each row, all in one call."""
        text_NLD = torch.cat([condition.text for condition in conditions])
        return self._pipeline.unet(
            inputs_NCHW, timesteps_N.to(self._device), encoder_hidden_states=text_NLD, return_dict=False
        )[0]

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Decode, apply the pipeline's own safety checker where it has one, and return RGB images."""
        pipeline = self._pipeline
        pixels_NCHW = pipeline.vae.decode(latents_NCHW / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels_NCHW, flagged = pipeline.run_safety_checker(pixels_NCHW, self._device, self._dtype)
        denormalized = [True] * len(pixels_NCHW) if flagged is None else [not flag for flag in flagged]
        return pipeline.image_processor.postprocess(pixels_NCHW, output_type="pil", do_denormalize=denormalized)

    def _embedded(self, texts: Sequence[str]) -> dict[str, Condition]:
        unknown = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if unknown:
            text_NLD, _ = self._pipeline.encode_prompt(unknown, self._device, 1, False)
            self._texts.update(
                (text, Condition(row_1LD)) for text, row_1LD in zip(unknown, text_NLD.split(1), strict=True)
            )
        found = {}
        for text in texts:
            self._texts.move_to_end(text)
            found[text] = self._texts[text]
        while len(self._texts) > _CACHED_TEXTS:
            self._texts.popitem(last=False)
        return found


def _guided(request: ImageRequest) -> bool:
    return request.guidance_scale > 1
