"""Stable Diffusion 1.x, 2.x and XL as the engine sees them, and the choice of a family's denoiser.

Shapes: N rows or images, L tokens, D features of a token, C channels, H x W positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from selma_ray.adapters.mixing import Expert, ExpertLayers
from selma_ray.errors import ConfigError
from selma_ray.serving.caching import DeepFeatures
from selma_ray.serving.conditions import Condition, Conditions, Denoiser, Texts
from selma_ray.serving.flow_denoisers import FluxDenoiser, StableDiffusion3Denoiser
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.schedulers import Course

__all__ = ["StableDiffusionDenoiser", "StableDiffusionXLDenoiser", "denoiser_for"]


def denoiser_for(pipeline: Any, experts: Mapping[str, Expert] | None = None, cache_interval: int = 1) -> Denoiser:
    """Return the denoiser of a loaded pipeline, with experts that its requests may mix, and step caching above interval 1.

    Raises ConfigError for a family that cannot be served and for step caching without a UNet, AdapterError for an expert that
    does not fit.
    """
    family = _FAMILIES.get(type(pipeline))
    if family is None:
        known = ", ".join(known.__name__ for known in _FAMILIES)
        raise ConfigError(f"the model to serve must be one of {known}, got {type(pipeline).__name__}")
    if issubclass(family, StableDiffusionDenoiser):
        return family(pipeline, experts or {}, cache_interval)
    if cache_interval > 1:
        raise ConfigError(
            f"cache_interval must be 1 for {type(pipeline).__name__}, got {cache_interval}; step caching is for UNets"
        )
    return family(pipeline, experts or {})


class StableDiffusionDenoiser:
    """Stable Diffusion 1.x and 2.x, for epsilon and v prediction."""

    def __init__(self, pipeline: Any, experts: Mapping[str, Expert] | None = None, cache_interval: int = 1) -> None:
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ConfigError(
                "the model to serve must not be distilled for guidance as latent consistency models are; serve the model it came from"
            )
        self._pipeline = pipeline
        self._deep_features = DeepFeatures(pipeline.unet, cache_interval) if cache_interval > 1 else None
        self._experts = ExpertLayers(pipeline.unet, experts or {})
        self._device = pipeline._execution_device
        self._dtype = pipeline.unet.dtype
        self._texts = Texts(self._embed)

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the prompts, and the negative prompts where guidance needs them; texts seen lately are remembered."""
        return self._texts.conditions(requests)

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request as diffusers' pipeline draws it."""
        scale = self._pipeline.vae_scale_factor
        shape_NCHW = (1, self._pipeline.unet.config.in_channels, request.height_px // scale, request.width_px // scale)
        return Course(self._pipeline.scheduler, request.steps, request.seed, shape_NCHW, self._dtype, self._device)

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the UNet's prediction for each row, all in one call, whatever experts each row mixes."""
        if self._deep_features is None:
            return self._predict(inputs_NCHW, timesteps_N, conditions)
        return self._deep_features.predict(
            lambda rows: self._predict(inputs_NCHW[rows], timesteps_N[rows], [conditions[row] for row in rows]),
            [condition.memory for condition in conditions],
        )

    def _predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        self._experts.weigh([condition.mix for condition in conditions])
        return self._pipeline.unet(
            inputs_NCHW,
            timesteps_N.to(self._device),
            encoder_hidden_states=torch.cat([condition.text for condition in conditions]),
            added_cond_kwargs={
                name: torch.cat([condition.added[name] for condition in conditions]) for name in conditions[0].added
            },
            return_dict=False,
        )[0]

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Decode, apply the pipeline's own safety checker where it has one, and return RGB images."""
        pipeline = self._pipeline
        pixels_NCHW = pipeline.vae.decode(latents_NCHW / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels_NCHW, flagged = pipeline.run_safety_checker(pixels_NCHW, self._device, self._dtype)
        denormalized = [True] * len(pixels_NCHW) if flagged is None else [not flag for flag in flagged]
        return pipeline.image_processor.postprocess(pixels_NCHW, output_type="pil", do_denormalize=denormalized)

    def _embed(self, texts: list[str]) -> list[Condition]:
        text_NLD, _ = self._pipeline.encode_prompt(texts, self._device, 1, False)
        return [Condition(text) for text in text_NLD.split(1)]


class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """Stable Diffusion XL, at the size it is asked for and without crops."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the texts and add the size; without a negative prompt its condition is zero where the model wants that."""
        zeros = self._pipeline.config.force_zeros_for_empty_prompt
        conditions = []
        for request, embedded in zip(requests, super().encode(requests), strict=True):
            time_ids, negative = self._time_ids(request), embedded.negative
            if negative is not None:
                negative = _zeroed(negative) if zeros and not request.negative_prompt else negative
                negative = _with(negative, time_ids)
            conditions.append(Conditions(_with(embedded.positive, time_ids), negative))
        return conditions

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Decode, in full precision where the autoencoder overflows in half, and return RGB images."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(torch.float32)
        try:
            latents_NCHW = latents_NCHW.to(vae.dtype) / vae.config.scaling_factor
            if vae.config.latents_mean is not None and vae.config.latents_std is not None:
                std_C, mean_C = (
                    latents_NCHW.new_tensor(vae.config.latents_std),
                    latents_NCHW.new_tensor(vae.config.latents_mean),
                )
                latents_NCHW = latents_NCHW * std_C.view(1, -1, 1, 1) + mean_C.view(1, -1, 1, 1)
            pixels_NCHW = vae.decode(latents_NCHW, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(torch.float16)
        if pipeline.watermark is not None:
            pixels_NCHW = pipeline.watermark.apply_watermark(pixels_NCHW)
        return pipeline.image_processor.postprocess(pixels_NCHW, output_type="pil")

    def _embed(self, texts: list[str]) -> list[Condition]:
        text_NLD, _, pooled_ND, _ = self._pipeline.encode_prompt(
            texts, device=self._device, do_classifier_free_guidance=False
        )
        return [
            Condition(text, {"text_embeds": pooled})
            for text, pooled in zip(text_NLD.split(1), pooled_ND.split(1), strict=True)
        ]

    def _time_ids(self, request: ImageRequest) -> torch.Tensor:
        """Return original size, crop and target size, 1 x 6."""
        sizes = [*request.size_px, 0, 0, *request.size_px]
        return torch.tensor([sizes], dtype=self._dtype, device=self._device)


_FAMILIES: Mapping[type, type[StableDiffusionDenoiser] | type[FluxDenoiser] | type[StableDiffusion3Denoiser]] = {
    StableDiffusionPipeline: StableDiffusionDenoiser,
    StableDiffusionXLPipeline: StableDiffusionXLDenoiser,
    StableDiffusion3Pipeline: StableDiffusion3Denoiser,
    FluxPipeline: FluxDenoiser,
}


def _with(condition: Condition, time_ids: torch.Tensor) -> Condition:
    return replace(condition, added={**condition.added, "time_ids": time_ids})


def _zeroed(condition: Condition) -> Condition:
    added = {name: torch.zeros_like(value) for name, value in condition.added.items()}
    return replace(condition, text=torch.zeros_like(condition.text), added=added)
