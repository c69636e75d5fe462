"""FLUX.1: CLIP's pooled embedding and T5's states, a transformer over patches of 2 x 2 latents, guidance as an input.

Shapes: N examples, T text tokens, D text width, P pooled width, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from selma_ray.models.family import Batch
from selma_ray.models.flow_matching import FlowMatching
from selma_ray.models.parts import ImageEncoder, encoding_pipeline

__all__ = ["Flux", "FluxEncoders"]

_TRAINING_GUIDANCE = 3.5  # what diffusers' LoRA script for FLUX tells a guidance-distilled transformer


class Flux(FlowMatching):
    """A FluxPipeline's parts, each loaded from its own sub-folder when it is needed."""

    predictions_per_step = 1
    transformer_class = FluxTransformer2DModel
    tokens = 512  # of T5

    def load_encoders(self) -> "FluxEncoders":
        """Load the autoencoder and both text encoders in the model's precision; no transformer is read."""
        return FluxEncoders(encoding_pipeline(self.model, self.located, FluxPipeline, transformer=None))

    def _velocity(
        self, denoiser: torch.nn.Module, noisy_NChw: torch.Tensor, sigmas_N: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        count, channels, height, width = noisy_NChw.shape
        device, dtype = noisy_NChw.device, noisy_NChw.dtype
        guided = _config_of(denoiser).guidance_embeds
        packed = denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy_NChw, count, channels, height, width),
            timestep=sigmas_N.to(dtype),
            guidance=torch.full((count,), _TRAINING_GUIDANCE, device=device, dtype=dtype) if guided else None,
            pooled_projections=batch["pooled_NP"],
            encoder_hidden_states=batch["text_NTD"],
            txt_ids=torch.zeros(batch["text_NTD"].shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        patches = packed.view(count, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)


class FluxEncoders(ImageEncoder):
    """An autoencoder and FLUX's two text encoders that encode one row at a time."""

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return `text_NTD` and `pooled_NP` in the encoders' precision, on the CPU; sizes do not matter to this family."""
        encoded = [self._pipeline.encode_prompt(prompt, prompt, device=self._pipeline.device) for prompt in prompts]
        return {
            "text_NTD": torch.cat([text for text, _, _ in encoded]).cpu(),
            "pooled_NP": torch.cat([pooled for _, pooled, _ in encoded]).cpu(),
        }

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return the conditioning of the empty prompt."""
        return self.encode_prompts([""])


def _config_of(denoiser: torch.nn.Module):
    """Return the transformer's own configuration, whatever wraps it: PEFT and DeepSpeed have a `config` of their own."""
    return next(module.config for module in denoiser.modules() if isinstance(module, FluxTransformer2DModel))
