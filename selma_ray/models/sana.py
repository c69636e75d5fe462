"""SANA: a language model told how to read a prompt, linear attention, an autoencoder of 32 x 32 pixels a latent, without a posterior.

Shapes: N examples or images, T text tokens, D text width, C latent channels, h x w latent pixels.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

from selma_ray.models.conditions import Condition, Conditions, Texts, trimmed
from selma_ray.models.config import SamplingConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline, own_config

__all__ = ["Sana", "SanaEncoders", "SanaPredictor"]

_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    return _embedded(pipeline, texts, _INSTRUCTION)


def _embedded(pipeline: Any, texts: list[str], instruction: list[str] | None) -> Condition:
    text_NTD, mask_NT, *_ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, complex_human_instruction=instruction
    )
    return trimmed({"text_NTD": text_NTD, "mask_NT": mask_NT.bool()})


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    return denoiser(
        noisy_NChw,
        encoder_hidden_states=conditioning["text_NTD"],
        encoder_attention_mask=conditioning["mask_NT"],
        timestep=timesteps_N * own_config(denoiser).timestep_scale,
        return_dict=False,
    )[0]


class Sana(FlowMatching):
    """A SanaPipeline's parts, each loaded from its own sub-folder when it is needed."""

    transformer_class = SanaTransformer2DModel
    autoencoder_class = AutoencoderDC
    tokens = 300
    token_latents = 1
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> "SanaEncoders":
        """Load the autoencoder and the language model in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, SanaPipeline, device, transformer=None)
        return SanaEncoders(pipeline, _encode_texts)

    def decoded_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape, without N, of what the autoencoder turns into an image."""
        scale = 2 ** (len(self._autoencoder["encoder_block_out_channels"]) - 1)
        return self._autoencoder["latent_channels"], height_px // scale, width_px // scale

    def _text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text_NTD": (self.tokens, self._transformer["caption_channels"]), "mask_NT": (self.tokens,)}


class SanaEncoders(PipelineEncoders):
    """An autoencoder that has one latent for an image, and a language model."""

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt without the instruction, which guidance starts from at sampling time."""
        with torch.inference_mode():
            return {name: tensor.cpu() for name, tensor in _embedded(self._pipeline, [""], None).items()}

    def _posterior(self, pixels_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents_NChw = self._pipeline.vae.encode(pixels_N3HW).latent
        return latents_NChw, torch.zeros_like(latents_NChw)


class SanaPredictor(FlowPredictor):
    """A SanaPipeline, with classifier-free guidance, at the size it is asked for; latents stay in fp32."""

    texts_vary = True
    latents_dtype = torch.float32
    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._negatives = Texts(lambda texts: [_embedded(pipeline, [text], None) for text in texts])

    @staticmethod
    def call_arguments(pipeline: Any, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """Return the guidance, and that images have the size they are asked for, not that of the nearest bucket."""
        negative = [sampling.negative_prompt] * count
        return {
            "guidance_scale": sampling.guidance_scale,
            "negative_prompt": negative,
            "use_resolution_binning": False,
        }

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the prompts with the instruction, and without it the negative prompts where guidance needs them."""
        told = self._texts.embedded([drawing.prompt for drawing in drawings])
        negatives = [drawing.negative_prompt for drawing in drawings if drawing.guidance_scale > self.guides_above]
        told_not = self._negatives.embedded(negatives)
        return [
            Conditions(
                told[drawing.prompt],
                told_not[drawing.negative_prompt] if drawing.guidance_scale > self.guides_above else None,
            )
            for drawing in drawings
        ]

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for a size that has no whole latents."""
        return self._course(drawing, self.denoiser.config.in_channels, 1, {})

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the velocity for each row (NChw, fp32)."""
        return super().predict(inputs_NChw.to(self._dtype), timesteps_N, conditions).float()

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        vae = self._pipeline.vae
        return vae.encode(pixels_N3HW.to(vae.dtype)).latent * vae.config.scaling_factor

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        return vae.decode(latents_NChw.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
