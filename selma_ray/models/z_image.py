"""Z-Image: a language model's states of any length, one stream of patches and text, a prediction towards the image.

Its transformer takes lists, counts time from noise (0) to image (1), and predicts latents - noise; here it looks like the others.

Shapes: N examples or images, T text tokens, D text width, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from selma_ray.models.conditions import Condition, stacked
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.encoding import PipelineEncoders
from selma_ray.models.flow_matching import FlowMatching, FlowPredictor
from selma_ray.models.parts import encoding_pipeline

__all__ = ["ZImage", "ZImagePredictor"]

_PATCH = 2


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    embedded, _ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
    return stacked([_of_one_text(text_TD) for text_TD in embedded])


def _of_one_text(text_TD: torch.Tensor) -> Condition:
    return {"text_NTD": text_TD[None], "mask_NT": text_TD.new_ones((1, len(text_TD)), dtype=torch.bool)}


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    """Call the transformer; returns the velocity, which is what it predicts, negated."""
    predicted = denoiser(
        list(noisy_NChw.unsqueeze(2)), (1000 - timesteps_N) / 1000, _texts(conditioning), return_dict=False
    )[0]
    return -torch.stack(predicted).squeeze(2)


def _texts(conditioning: Condition) -> list[torch.Tensor]:
    """Return each row's text (TD) without what fills it up; in a plan, which knows no lengths, all of it."""
    text_NTD, mask_NT = conditioning["text_NTD"], conditioning["mask_NT"]
    if mask_NT.is_meta:
        return list(text_NTD)
    lengths = mask_NT.sum(1).int().tolist()
    return [text_TD[:length] for text_TD, length in zip(text_NTD, lengths, strict=True)]


class ZImage(FlowMatching):
    """A ZImagePipeline's parts, each loaded from its own sub-folder when it is needed."""

    guides_above = 0.0
    transformer_class = ZImageTransformer2DModel
    tokens = 512  # with those of the chat template around a prompt
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> PipelineEncoders:
        """Load the autoencoder and the language model in the model's precision, onto a device; no transformer is read."""
        pipeline = encoding_pipeline(self.model, self.located, ZImagePipeline, device, transformer=None)
        return PipelineEncoders(pipeline, _encode_texts)

    def _text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text_NTD": (self.tokens, self._transformer["cap_feat_dim"]), "mask_NT": (self.tokens,)}


class ZImagePredictor(FlowPredictor):
    """A ZImagePipeline, whose guidance scale counts from 0: it adds so many times what the prompt changes; latents stay in fp32."""

    guides_above = 0.0
    texts_vary = True
    latents_dtype = torch.float32
    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for a size that has no whole patches."""
        schedule = {
            "mu": self._shift(drawing, _PATCH, 1.15),
            "sigmas": torch.linspace(1.0, 1 / drawing.steps, drawing.steps).tolist(),
        }
        return self._course(drawing, self.denoiser.config.in_channels, _PATCH, schedule)

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the velocity for each row (NChw, fp32)."""
        return super().predict(inputs_NChw.to(self._dtype), timesteps_N, conditions).float()

    def guide(
        self, drawing: Drawing, predicted_NChw: torch.Tensor, unconditional_NChw: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction to follow: beyond the conditional one by the guidance scale (Saharia et al. 2022, equation 2)."""
        if unconditional_NChw is None:
            return predicted_NChw
        return predicted_NChw + drawing.guidance_scale * (predicted_NChw - unconditional_NChw)

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        return super()._decode(latents_NChw.to(self._pipeline.vae.dtype))
