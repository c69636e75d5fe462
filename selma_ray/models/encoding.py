"""From images and captions to what a denoiser learns from, one row at a time.

Row by row, so that what is cached for a row depends on that row alone, to the bit, whatever shard it came in.

Shapes: N examples, H x W pixels, C latent channels, h x w latent pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["EncodeTexts", "PipelineEncoders"]

EncodeTexts = Callable[[Any, list[str]], Mapping[str, torch.Tensor]]
"""From a pipeline and texts to their conditioning, N first."""


class PipelineEncoders:
    """A pipeline's autoencoder and text encoders."""

    def __init__(self, pipeline: Any, encode_texts: EncodeTexts) -> None:
        self._pipeline = pipeline
        self._encode_texts = encode_texts
        # Encoded once and learnt from many times: half precision loses what the denoiser is to match, and SDXL's overflows in fp16.
        pipeline.vae.to(torch.float32)

    @torch.inference_mode()
    def encode_images(self, images_NHW3: np.ndarray) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU, unscaled) of uint8 images."""
        posteriors = [self._pipeline.vae.encode(self._pixels(image_HW3)).latent_dist for image_HW3 in images_NHW3]
        return {
            "latent_mean": torch.cat([posterior.mean for posterior in posteriors]).float().cpu(),
            "latent_std": torch.cat([posterior.std for posterior in posteriors]).float().cpu(),
        }

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return the conditioning of each prompt in the encoders' precision, on the CPU; sizes matter to some families alone."""
        encoded = [self._encode_texts(self._pipeline, [prompt]) for prompt in prompts]
        return {name: torch.cat([row[name] for row in encoded]).cpu() for name in encoded[0]}

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt, which guidance starts from at sampling time."""
        return self.encode_prompts([""])

    def _pixels(self, image_HW3: np.ndarray) -> torch.Tensor:
        pixels_3HW = torch.from_numpy(np.array(image_HW3)).permute(2, 0, 1)
        return pixels_3HW[None].to(self._pipeline.device, self._pipeline.vae.dtype) / 127.5 - 1.0
