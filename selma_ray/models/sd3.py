"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a pooled text embedding, a multimodal transformer.

Shapes: N examples, T text tokens, D text width, P pooled width, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from selma_ray.models.family import Batch
from selma_ray.models.flow_matching import FlowMatching
from selma_ray.models.parts import ImageEncoder, encoding_pipeline

__all__ = ["StableDiffusion3", "StableDiffusion3Encoders"]


class StableDiffusion3(FlowMatching):
    """A StableDiffusion3Pipeline's parts, each loaded from its own sub-folder when it is needed."""

    transformer_class = SD3Transformer2DModel
    tokens = 77 + 256  # of CLIP, then of T5

    def load_encoders(self) -> "StableDiffusion3Encoders":
        """Load the autoencoder and the text encoders in the model's precision; no transformer is read."""
        return StableDiffusion3Encoders(
            encoding_pipeline(self.model, self.located, StableDiffusion3Pipeline, transformer=None)
        )

    def _velocity(
        self, denoiser: torch.nn.Module, noisy_NChw: torch.Tensor, sigmas_N: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_NChw,
            timestep=sigmas_N * self.schedule.config.num_train_timesteps,
            encoder_hidden_states=batch["text_NTD"],
            pooled_projections=batch["pooled_NP"],
            return_dict=False,
        )[0]


class StableDiffusion3Encoders(ImageEncoder):
    """An autoencoder and SD3's three text encoders that encode one row at a time."""

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return `text_NTD` and `pooled_NP` in the encoders' precision, on the CPU; sizes do not matter to this family."""
        encoded = [
            self._pipeline.encode_prompt(
                prompt, prompt, prompt, device=self._pipeline.device, do_classifier_free_guidance=False
            )
            for prompt in prompts
        ]
        return {
            "text_NTD": torch.cat([text for text, _, _, _ in encoded]).cpu(),
            "pooled_NP": torch.cat([pooled for _, _, pooled, _ in encoded]).cpu(),
        }

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt, which guidance starts from at sampling time."""
        return self.encode_prompts([""])
