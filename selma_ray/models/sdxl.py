"""Stable Diffusion XL: two text encoders, a pooled text embedding, and the image's size as conditioning.

Shapes: N examples, T text tokens, D text width (both encoders together), P pooled width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from selma_ray.models.family import Batch
from selma_ray.models.parts import encoding_pipeline, load_config
from selma_ray.models.stable_diffusion import StableDiffusion, StableDiffusionEncoders

__all__ = ["StableDiffusionXL", "StableDiffusionXLEncoders"]


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline's parts; the loss is Stable Diffusion's, the conditioning its own."""

    def load_encoders(self) -> "StableDiffusionXLEncoders":
        """Load the autoencoder and both text encoders in the model's precision, on the best device; no UNet is read."""
        return StableDiffusionXLEncoders(
            encoding_pipeline(self.model, self.located, StableDiffusionXLPipeline, unet=None)
        )

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N."""
        unet = load_config(self.model, self.located, UNet2DConditionModel, "unet")
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        return super().example_shapes(height_px, width_px) | {"pooled_NP": (pooled,), "time_ids_N6": (6,)}

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        added = {"text_embeds": batch["pooled_NP"], "time_ids": batch["time_ids_N6"]}
        return {"encoder_hidden_states": batch["text_NTD"], "added_cond_kwargs": added}


class StableDiffusionXLEncoders(StableDiffusionEncoders):
    """An autoencoder and SDXL's two text encoders that encode one row at a time."""

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], height_px: int, width_px: int) -> dict[str, torch.Tensor]:
        """Return `text_NTD`, `pooled_NP` and `time_ids_N6`: the image's size, no crop, the same size as the target."""
        encoded = [
            self._pipeline.encode_prompt(prompt, device=self._pipeline.device, do_classifier_free_guidance=False)
            for prompt in prompts
        ]
        return {
            "text_NTD": torch.cat([text for text, _, _, _ in encoded]).float().cpu(),
            "pooled_NP": torch.cat([pooled for _, _, pooled, _ in encoded]).float().cpu(),
            "time_ids_N6": torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]] * len(prompts)).float(),
        }

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return what guidance starts from at sampling time: zeros where the pipeline says so, else the empty prompt's."""
        encoded = self.encode_prompts([""], 0, 0)
        zeroed = self._pipeline.config.force_zeros_for_empty_prompt
        return {name: encoded[name] * (0.0 if zeroed else 1.0) for name in ("text_NTD", "pooled_NP")}
