"""From images and captions to what a denoiser learns from.

On the CPU row by row, so that what is cached for a row depends on that row alone, to the bit, whatever shard it came in; on a card
several rows at a time, which is faster and holds up to rounding.

Shapes: N examples, H x W pixels, C latent channels, h x w latent pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from selma_ray.models.batches import HalvingBatches
from selma_ray.models.conditions import stacked

__all__ = ["CARD_ROWS", "EncodeTexts", "PipelineEncoders"]

CARD_ROWS = 8
"""Images or captions that a card encodes at once, where they fit."""

EncodeTexts = Callable[[Any, list[str]], Mapping[str, torch.Tensor]]
"""From a pipeline and texts to their conditioning, N first."""


class PipelineEncoders:
    """A pipeline's autoencoder and text encoders."""

    def __init__(self, pipeline: Any, encode_texts: EncodeTexts) -> None:
        self._pipeline = pipeline
        self._encode_texts = encode_texts
        self._batches = HalvingBatches(1 if pipeline._execution_device.type == "cpu" else CARD_ROWS)
        # Encoded once and learnt from many times: half precision loses what the denoiser is to match, and SDXL's overflows in fp16.
        pipeline.vae.to(torch.float32)

    @torch.inference_mode()
    def encode_images(self, images_NHW3: np.ndarray) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU, unscaled) of uint8 images."""
        means_and_stds = self._batches.map(self._posteriors, list(images_NHW3))
        means, stds = zip(*means_and_stds, strict=True)
        return {"latent_mean": torch.stack(means), "latent_std": torch.stack(stds)}

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return the conditioning of each prompt in the encoders' precision, on the CPU; sizes matter to some families alone.

        Where lengths differ, texts are filled up to the longest of the call, and `mask_NT` tells which tokens are theirs.
        """
        return stacked(self._batches.map(self._conditions, list(prompts)))

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt, which guidance starts from at sampling time."""
        return self.encode_prompts([""])

    def _posteriors(self, images_HW3: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pixels_N3HW = torch.from_numpy(np.stack(images_HW3)).permute(0, 3, 1, 2)
        scaled_N3HW = pixels_N3HW.to(self._pipeline._execution_device, self._pipeline.vae.dtype) / 127.5 - 1.0
        mean_NChw, std_NChw = self._posterior(scaled_N3HW)
        return list(zip(mean_NChw.float().cpu(), std_NChw.float().cpu(), strict=True))

    def _posterior(self, pixels_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the latents (NChw); families whose latents have statistics apply them here."""
        posterior = self._pipeline.vae.encode(pixels_N3HW).latent_dist
        return posterior.mean, posterior.std

    def _conditions(self, prompts: Sequence[str]) -> list[Mapping[str, torch.Tensor]]:
        encoded = {name: tensor.cpu() for name, tensor in self._encode_texts(self._pipeline, list(prompts)).items()}
        return [{name: tensor[row : row + 1] for name, tensor in encoded.items()} for row in range(len(prompts))]
