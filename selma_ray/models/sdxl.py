"""Stable Diffusion XL: two text encoders, a pooled text embedding, and the image's size as conditioning.

Shapes: N examples or images, T text tokens, D text width (both encoders together), P pooled width, H x W pixels, C latent channels,
h x w latent pixels.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.drawing import Drawing
from selma_ray.models.parts import encoding_pipeline, load_config
from selma_ray.models.stable_diffusion import StableDiffusion, StableDiffusionEncoders, StableDiffusionPredictor

__all__ = ["StableDiffusionXL", "StableDiffusionXLEncoders", "StableDiffusionXLPredictor"]

_PRECISION = threading.Lock()


def _encode_texts(pipeline: Any, texts: list[str]) -> Condition:
    text_NTD, _, pooled_NP, _ = pipeline.encode_prompt(
        texts, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return {"text_NTD": text_NTD, "pooled_NP": pooled_NP}


def _time_ids(height_px: int, width_px: int) -> list[int]:
    """Return original size, crop and target size: no crop, and the same size as the target."""
    return [height_px, width_px, 0, 0, height_px, width_px]


def _denoise(
    denoiser: Any, noisy_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditioning: Condition
) -> torch.Tensor:
    return denoiser(
        noisy_NChw,
        timesteps_N,
        encoder_hidden_states=conditioning["text_NTD"],
        added_cond_kwargs={"text_embeds": conditioning["pooled_NP"], "time_ids": conditioning["time_ids_N6"]},
        return_dict=False,
    )[0]


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline's parts; the loss is Stable Diffusion's, the conditioning its own."""

    upcasts_autoencoder = True
    _denoise = staticmethod(_denoise)

    def load_encoders(self, device: torch.device | str) -> "StableDiffusionXLEncoders":
        """Load the autoencoder and both text encoders in the model's precision, onto a device; no UNet is read."""
        pipeline = encoding_pipeline(self.model, self.located, StableDiffusionXLPipeline, device, unet=None)
        return StableDiffusionXLEncoders(pipeline, _encode_texts)

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N."""
        unet = load_config(self.model, self.located, UNet2DConditionModel, "unet")
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        return super().example_shapes(height_px, width_px) | {"pooled_NP": (pooled,), "time_ids_N6": (6,)}


class StableDiffusionXLEncoders(StableDiffusionEncoders):
    """An autoencoder and SDXL's two text encoders."""

    def encode_prompts(self, prompts: Sequence[str], height_px: int = 0, width_px: int = 0) -> dict[str, torch.Tensor]:
        """Return the conditioning of each prompt and of its image's size, in fp32, on the CPU."""
        time_ids_N6 = torch.tensor([_time_ids(height_px, width_px)] * len(prompts)).float()
        return super().encode_prompts(prompts) | {"time_ids_N6": time_ids_N6}

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return what guidance starts from at sampling time: zeros where the pipeline says so, else the empty prompt's."""
        encoded = self.encode_prompts([""])
        zeroed = self._pipeline.config.force_zeros_for_empty_prompt
        return {name: encoded[name] * (0.0 if zeroed else 1.0) for name in ("text_NTD", "pooled_NP")}


class StableDiffusionXLPredictor(StableDiffusionPredictor):
    """A StableDiffusionXLPipeline, at the size it is asked for and without crops."""

    _encode_texts = staticmethod(_encode_texts)
    _denoise = staticmethod(_denoise)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        with _PRECISION:  # another predictor of this autoencoder may be at work
            self._is_half = pipeline.vae.dtype == torch.float16

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the texts and add the size; without a negative prompt its condition is zero where the model wants that."""
        zeros = self._pipeline.config.force_zeros_for_empty_prompt
        conditions = []
        for drawing, embedded in zip(drawings, super().encode(drawings), strict=True):
            size = {"time_ids_N6": torch.tensor([_time_ids(*drawing.size_px)], dtype=self._dtype, device=self._device)}
            negative = embedded.negative
            if negative is not None:
                negative = _zeroed(negative) if zeros and not drawing.negative_prompt else negative
                negative = {**negative, **size}
            conditions.append(Conditions({**embedded.positive, **size}, negative))
        return conditions

    def _decode(self, latents_NChw: torch.Tensor) -> torch.Tensor:
        """Decode, in full precision where the autoencoder overflows in half."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        with self._full_precision():
            latents_NChw = latents_NChw.to(vae.dtype) / vae.config.scaling_factor
            if vae.config.latents_mean is not None and vae.config.latents_std is not None:
                mean_1C11, std_1C11 = self._latent_mean_and_std(latents_NChw)
                latents_NChw = latents_NChw * std_1C11 + mean_1C11
            pixels_N3HW = vae.decode(latents_NChw, return_dict=False)[0]
        if pipeline.watermark is not None:
            pixels_N3HW = pipeline.watermark.apply_watermark(pixels_N3HW)
        return pixels_N3HW

    def _sample(self, pixels_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Encode, in full precision where the autoencoder overflows in half."""
        vae = self._pipeline.vae
        with self._full_precision():
            latents_NChw = vae.encode(pixels_N3HW.to(vae.dtype)).latent_dist.sample(generator).to(self._dtype)
        if vae.config.latents_mean is not None and vae.config.latents_std is not None:
            mean_1C11, std_1C11 = self._latent_mean_and_std(latents_NChw)
            latents_NChw = (latents_NChw - mean_1C11) / std_1C11
        return latents_NChw * vae.config.scaling_factor

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Give an autoencoder that overflows in half precision the full one, one caller at a time; it has its own again whatever fails."""
        vae = self._pipeline.vae
        if not (self._is_half and vae.config.force_upcast):
            yield
            return
        with _PRECISION:
            try:
                vae.to(torch.float32)
                yield
            finally:
                if vae.device.type == "cuda":
                    torch.cuda.current_stream(vae.device).synchronize()  # another stream may be the next to use it
                vae.to(torch.float16)

    def _latent_mean_and_std(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._pipeline.vae.config
        mean_C, std_C = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean_C.view(1, -1, 1, 1), std_C.view(1, -1, 1, 1)


def _zeroed(condition: Condition) -> Condition:
    return {name: torch.zeros_like(tensor) for name, tensor in condition.items()}
