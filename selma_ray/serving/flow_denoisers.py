"""Stable Diffusion 3 and FLUX as the engine sees them: transformers that predict a velocity (flow matching).

Shapes: N rows or images, L tokens, D features of a token, P pooled features, C channels, H x W latent positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from selma_ray.adapters.mixing import Expert, ExpertLayers
from selma_ray.serving.conditions import Condition, Conditions, Texts, for_request
from selma_ray.serving.errors import invalid_request
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.schedulers import Course

__all__ = ["FluxDenoiser", "StableDiffusion3Denoiser"]

_PATCH = 2  # latent positions on each side of what FLUX's transformer sees as one


class _FlowDenoiser:
    """What the two families share: texts that are remembered, a velocity's course, the autoencoder's shift."""

    def __init__(self, pipeline: Any, experts: Mapping[str, Expert] | None = None) -> None:
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._experts = ExpertLayers(pipeline.transformer, experts or {})
        self._device = pipeline._execution_device
        self._dtype = pipeline.transformer.dtype
        self._texts = Texts(self._embed)

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the prompts, and the negative prompts where guidance needs them; texts seen lately are remembered."""
        return self._texts.conditions(requests)

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Decode and return RGB images."""
        vae = self._pipeline.vae
        latents_NCHW = latents_NCHW / vae.config.scaling_factor + vae.config.shift_factor
        return self._pipeline.image_processor.postprocess(
            vae.decode(latents_NCHW, return_dict=False)[0], output_type="pil"
        )

    def _embed(self, texts: list[str]) -> list[Condition]:
        raise NotImplementedError

    def _course(self, request: ImageRequest, channels: int, patch: int, schedule: Mapping[str, Any]) -> Course:
        """Draw the initial noise as diffusers' pipelines do; raises RequestError (400) for a size that has no whole patches."""
        unit_px = self._pipeline.vae_scale_factor * patch
        if request.height_px % unit_px or request.width_px % unit_px:
            raise invalid_request(
                f"size must have sides that are multiples of {unit_px} with this model, got {request.width_px}x{request.height_px}",
                "size",
            )
        scale = self._pipeline.vae_scale_factor
        shape_NCHW = (1, channels, request.height_px // scale, request.width_px // scale)
        return Course(
            self._pipeline.scheduler, request.steps, request.seed, shape_NCHW, self._dtype, self._device, schedule
        )

    def _shift(self, request: ImageRequest, patch: int, default_most: float) -> float:
        """Return how far noise levels are shifted for an image of this size (2403.03206, section 5.3.2)."""
        config, unit_px = self._pipeline.scheduler.config, self._pipeline.vae_scale_factor * patch
        return calculate_shift(
            (request.height_px // unit_px) * (request.width_px // unit_px),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", default_most),
        )


class StableDiffusion3Denoiser(_FlowDenoiser):
    """Stable Diffusion 3 and 3.5, with classifier-free guidance."""

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request; raises RequestError (400) for a size that the model has no positions for."""
        config = self._transformer.config
        most_px = config.pos_embed_max_size * config.patch_size * self._pipeline.vae_scale_factor
        if max(request.size_px) > most_px:
            raise invalid_request(
                f"size must have sides of at most {most_px} px with this model, got {request.width_px}x{request.height_px}",
                "size",
            )
        shifted = self._pipeline.scheduler.config.get("use_dynamic_shifting", None)
        schedule = {"mu": self._shift(request, config.patch_size, 1.16)} if shifted else {}
        return self._course(request, config.in_channels, config.patch_size, schedule)

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the transformer's velocity for each row, all in one call, whatever experts each row mixes."""
        self._experts.weigh([condition.mix for condition in conditions])
        return self._transformer(
            hidden_states=inputs_NCHW,
            timestep=timesteps_N.to(self._device),
            encoder_hidden_states=torch.cat([condition.text for condition in conditions]),
            pooled_projections=torch.cat([condition.added["pooled_projections"] for condition in conditions]),
            return_dict=False,
        )[0]

    def _embed(self, texts: list[str]) -> list[Condition]:
        text_NLD, _, pooled_NP, _ = self._pipeline.encode_prompt(
            texts, None, None, device=self._device, do_classifier_free_guidance=False
        )
        return [
            Condition(text, {"pooled_projections": pooled})
            for text, pooled in zip(text_NLD.split(1), pooled_NP.split(1), strict=True)
        ]


class FluxDenoiser(_FlowDenoiser):
    """FLUX.1: guidance is an input of its transformer, so that a step needs one row a request; it knows no negative prompt."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the prompts and add the guidance; raises RequestError (400) for a negative prompt."""
        for request in requests:
            if request.negative_prompt:
                raise invalid_request(
                    "negative_prompt must be empty with this model, which has its guidance built in", "negative_prompt"
                )
        embedded = self._texts.embedded([request.prompt for request in requests])
        return [Conditions(self._told(embedded[request.prompt], request), None) for request in requests]

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request."""
        scheduler = self._pipeline.scheduler
        schedule: dict[str, Any] = {"mu": self._shift(request, _PATCH, 1.15)}
        if not getattr(scheduler.config, "use_flow_sigmas", False):
            schedule["sigmas"] = np.linspace(1.0, 1 / request.steps, request.steps)
        return self._course(request, self._transformer.config.in_channels // _PATCH**2, _PATCH, schedule)

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the transformer's velocity for each row, all in one call, whatever experts each row mixes."""
        self._experts.weigh([condition.mix for condition in conditions])
        count, channels, height, width = inputs_NCHW.shape
        guided = self._transformer.config.guidance_embeds
        packed = self._transformer(
            hidden_states=FluxPipeline._pack_latents(inputs_NCHW, count, channels, height, width),
            timestep=timesteps_N.to(self._device, self._dtype) / 1000,
            guidance=torch.cat([condition.added["guidance"] for condition in conditions]) if guided else None,
            pooled_projections=torch.cat([condition.added["pooled_projections"] for condition in conditions]),
            encoder_hidden_states=torch.cat([condition.text for condition in conditions]),
            txt_ids=torch.zeros(conditions[0].text.shape[1], 3, device=self._device, dtype=self._dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                count, height // _PATCH, width // _PATCH, self._device, self._dtype
            ),
            return_dict=False,
        )[0]
        scale = self._pipeline.vae_scale_factor
        return FluxPipeline._unpack_latents(packed, height * scale, width * scale, scale)

    def _told(self, condition: Condition, request: ImageRequest) -> Condition:
        guidance = torch.tensor([request.guidance_scale], dtype=torch.float32, device=self._device)
        return for_request(replace(condition, added={**condition.added, "guidance": guidance}), request)

    def _embed(self, texts: list[str]) -> list[Condition]:
        text_NLD, pooled_NP, _ = self._pipeline.encode_prompt(texts, device=self._device)
        return [
            Condition(text, {"pooled_projections": pooled})
            for text, pooled in zip(text_NLD.split(1), pooled_NP.split(1), strict=True)
        ]
