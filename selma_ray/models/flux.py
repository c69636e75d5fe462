"""FLUX.1: CLIP's pooled embedding and T5's states, a transformer over patches of 2 x 2 latents, guidance as an input.

Shapes: N examples or images, T text tokens, D text width, P pooled width, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from selma_ray.errors import DrawingError
from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.family import LossSettings
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline, own_config

__all__ = ["Flux", "FluxPredictor"]

_PATCH = 2  # latent pixels on each side of what the transformer sees as one


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    text_NTD, pooled_NP, _ = pipeline.encode_prompt(texts, device=pipeline._execution_device)
    return {"text_NTD": text_NTD, "pooled_NP": pooled_NP}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    """Call the transformer on packed latents; `guidance_N` is left out where the transformer has no such input."""
    count, channels, height, width = noisy_NChw.shape
    device, dtype = noisy_NChw.device, noisy_NChw.dtype
    packed = denoiser(
        hidden_states=FluxPipeline._pack_latents(noisy_NChw, count, channels, height, width),
        timestep=(timesteps_N / 1000).to(dtype),
        guidance=conditioning["guidance_N"] if own_config(denoiser).guidance_embeds else None,
        pooled_projections=conditioning["pooled_NP"],
        encoder_hidden_states=conditioning["text_NTD"],
        txt_ids=torch.zeros(conditioning["text_NTD"].shape[1], 3, device=device, dtype=dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // _PATCH, width // _PATCH, device, dtype),
        return_dict=False,
    )[0]
    patches = packed.view(count, height // _PATCH, width // _PATCH, channels, _PATCH, _PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)


class Flux(FlowMatching):
    """A FluxPipeline's parts, each loaded from its own sub-folder when it is needed."""

    predictions_per_step = 1
    transformer_class = FluxTransformer2DModel
    tokens = 512  # of T5
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> PipelineEncoders:
        """Load the autoencoder and both text encoders in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, FluxPipeline, device, transformer=None)
        return PipelineEncoders(pipeline, _encode_texts)

    def _told(self, conditioning: dict[str, torch.Tensor], settings: LossSettings) -> Condition:
        pooled_NP = conditioning["pooled_NP"]
        return conditioning | {"guidance_N": pooled_NP.new_full((len(pooled_NP),), settings.guidance_scale)}


class FluxPredictor(FlowPredictor):
    """A FluxPipeline: guidance is an input, so that a step needs one row an image; it knows no negative prompt."""

    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the prompts and add the guidance; raises DrawingError for a negative prompt."""
        for drawing in drawings:
            if drawing.negative_prompt:
                raise DrawingError(
                    "negative_prompt must be empty with this model, which has its guidance built in", "negative_prompt"
                )
        embedded = self._texts.embedded([drawing.prompt for drawing in drawings])
        return [Conditions({**embedded[drawing.prompt], **self._guidance(drawing)}, None) for drawing in drawings]

    def rows_of(self, drawing: Drawing) -> int:
        """Return 1: guidance takes no row."""
        return 1

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image."""
        schedule: dict[str, Any] = {"mu": self._shift(drawing, _PATCH, 1.15)}
        if not getattr(self._pipeline.scheduler.config, "use_flow_sigmas", False):
            schedule["sigmas"] = np.linspace(1.0, 1 / drawing.steps, drawing.steps)
        return self._course(drawing, self.denoiser.config.in_channels // _PATCH**2, _PATCH, schedule)

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the velocity for each row; timesteps are rounded to the model's precision first, as the pipeline rounds them."""
        return super().predict(inputs_NChw, timesteps_N.to(self._dtype), conditions)

    def _guidance(self, drawing: Drawing) -> Condition:
        return {"guidance_N": torch.tensor([drawing.guidance_scale], dtype=torch.float32, device=self._device)}
