"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a pooled text embedding, a multimodal transformer.

Shapes: N examples or images, T text tokens, D text width, P pooled width, C latent channels, h x w latent pixels.
"""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from selma_ray.errors import DrawingError
from selma_ray.models.conditions import Condition
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline

__all__ = ["StableDiffusion3", "StableDiffusion3Predictor"]


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    text_NTD, _, pooled_NP, _ = pipeline.encode_prompt(
        texts, None, None, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return {"text_NTD": text_NTD, "pooled_NP": pooled_NP}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    return denoiser(
        hidden_states=noisy_NChw,
        timestep=timesteps_N,
        encoder_hidden_states=conditioning["text_NTD"],
        pooled_projections=conditioning["pooled_NP"],
        return_dict=False,
    )[0]


class StableDiffusion3(FlowMatching):
    """A StableDiffusion3Pipeline's parts, each loaded from its own sub-folder when it is needed."""

    transformer_class = SD3Transformer2DModel
    tokens = 77 + 256  # of CLIP, then of T5
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> PipelineEncoders:
        """Load the autoencoder and the text encoders in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, StableDiffusion3Pipeline, device, transformer=None)
        return PipelineEncoders(pipeline, _encode_texts)


class StableDiffusion3Predictor(FlowPredictor):
    """A StableDiffusion3Pipeline, with classifier-free guidance."""

    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for a size that the model has no positions for."""
        config = self.denoiser.config
        most_px = config.pos_embed_max_size * config.patch_size * self._pipeline.vae_scale_factor
        if max(drawing.size_px) > most_px:
            raise DrawingError(
                f"size must have sides of at most {most_px} px with this model, got {drawing.width_px}x{drawing.height_px}",
                "size_px",
            )
        shifted = self._pipeline.scheduler.config.get("use_dynamic_shifting", None)
        schedule = {"mu": self._shift(drawing, config.patch_size, 1.16)} if shifted else {}
        return self._course(drawing, config.in_channels, config.patch_size, schedule)
