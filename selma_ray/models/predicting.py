"""A loaded pipeline taken apart, so that the rows of one step may stand at different timesteps.

Shapes: N rows or images, C latent channels, h x w latent pixels, H x W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from selma_ray.errors import RenderError
from selma_ray.models.conditions import Condition, Conditions, Texts, stacked, trimmed
from selma_ray.models.config import SamplingConfig
from selma_ray.models.course import Course, Start
from selma_ray.models.drawing import Drawing
from selma_ray.models.parts import denoiser_of, not_finite
from selma_ray.models.prompt_length import count_tokens

__all__ = ["PipelinePredictor"]


class PipelinePredictor(ABC):
    """What most families do alike: texts that are remembered, one call of the denoiser, classifier-free guidance."""

    guides_above: ClassVar[float] = 1.0
    """Guidance scale up to which there is none."""
    unprompted: ClassVar[str] = ""
    """What guidance starts from without a negative prompt."""
    position_latents: ClassVar[int] = 1
    """The autoencoder's latents on each side of a position of the course, which has them as channels."""
    texts_vary = False

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.denoiser: Any = denoiser_of(pipeline)
        self._device = pipeline._execution_device
        self._dtype = self.denoiser.dtype
        self._texts = Texts(self._embed)

    def tokens(self, text: str) -> tuple[int, int]:
        """Return how many tokens a text has, marks included, and how many of them the model sees: those of its longest encoder."""
        return count_tokens(self._pipeline, text)

    @staticmethod
    def call_arguments(pipeline: Any, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """Return the guidance, and what it starts from, as a call of the pipeline for `count` images takes them."""
        negative = {"negative_prompt": [sampling.negative_prompt] * count} if sampling.negative_prompt else {}
        return {"guidance_scale": sampling.guidance_scale, **negative}

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the prompts, and the negative prompts where guidance needs them; texts seen lately are remembered."""
        return self._texts.guided(drawings, self.guides_above, self.unprompted)

    def rows_of(self, drawing: Drawing) -> int:
        """Return how many rows of a step an image takes: two with classifier-free guidance."""
        return 2 if drawing.guidance_scale > self.guides_above else 1

    @abstractmethod
    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image as diffusers' pipeline draws it."""

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the denoiser's prediction for each row (NChw), all in one call."""
        return self._denoise(self.denoiser, inputs_NChw, timesteps_N.to(self._device), stacked(conditions))

    def guide(
        self, drawing: Drawing, predicted_NChw: torch.Tensor, unconditional_NChw: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction to follow: classifier-free guidance where there are two (Ho & Salimans, equation 6)."""
        if unconditional_NChw is None:
            return predicted_NChw
        return unconditional_NChw + drawing.guidance_scale * (predicted_NChw - unconditional_NChw)

    def decode(self, latents_NChw: torch.Tensor) -> list[Image.Image | RenderError]:
        """Turn latents into RGB images; one that is not finite is an error in its place, as a conversion would make it black."""
        pixels_N3HW = self._decode(latents_NChw)
        finite_N = torch.isfinite(pixels_N3HW).flatten(1).all(1).cpu()
        drawn = iter(
            self._pipeline.image_processor.postprocess(pixels_N3HW[finite_N], output_type="pil")
            if finite_N.any()
            else ()
        )
        return [next(drawn) if finite else not_finite(self._dtype) for finite in finite_N.tolist()]

    def _start_of(self, drawing: Drawing) -> Start | None:
        """Return the image that a drawing starts from, on the device and ready to be sampled; none where it starts from noise."""
        source = drawing.source
        if source is None:
            return None
        pixels_13HW = self._pipeline.image_processor.preprocess(source.image).to(self._device, self._dtype)
        mask_11hw = None
        if source.mask is not None:
            scale = self._pipeline.vae_scale_factor * self.position_latents
            size = (drawing.height_px // scale, drawing.width_px // scale)
            anew_11HW = torch.from_numpy(np.asarray(source.mask) >= 128)[None, None].float()
            mask_11hw = torch.nn.functional.interpolate(anew_11HW, size=size).to(self._device, self._dtype)
        return Start(lambda generator: self._sample(pixels_13HW, generator), source.strength, mask_11hw)

    @abstractmethod
    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw the denoiser's latents of images (-1 to 1) from the autoencoder's distribution."""

    @abstractmethod
    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        """Turn finished latents into pixels (N3HW, -1 to 1)."""

    @staticmethod
    @abstractmethod
    def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
        """Return the conditioning of each text, N first, in the encoders' precision and on their device."""

    @staticmethod
    @abstractmethod
    def _denoise(
        denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
    ) -> torch.Tensor:
        """Call the denoiser with what the family conditions on; returns its prediction (NChw)."""

    def _embed(self, texts: list[str]) -> list[Condition]:
        if self._device.type == "cpu" and len(texts) > 1:  # no faster together there, and rounded by how many there are
            return [condition for text in texts for condition in self._embed([text])]
        encoded = self._encode_texts(self._pipeline, texts)
        return [trimmed({name: tensor[row : row + 1] for name, tensor in encoded.items()}) for row in range(len(texts))]
