"""What families share: the denoiser alone, the pipeline without it, and noise that batches do not change.

Shapes: N examples, C latent channels, h x w latent pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoModel
from diffusers.utils.torch_utils import randn_tensor

from selma_ray.errors import ModelNotFoundError, RenderError, first_line
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import Batch
from selma_ray.models.locate import LocatedModel, locate_part
from selma_ray.models.long_prompts import read_in_chunks

__all__ = [
    "DENOISERS",
    "DTYPES",
    "autoencoder_config",
    "denoiser_name",
    "denoiser_of",
    "encoding_pipeline",
    "latent_shape",
    "load_config",
    "load_denoiser",
    "load_errors",
    "noise_like",
    "not_finite",
    "own_config",
    "replaced_autoencoder",
    "sample_latents",
    "squared_errors",
    "without_spread",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that recipes have for them."""

DENOISERS = ("unet", "transformer")
"""Names that a pipeline's denoiser may have, which are also those of its folder."""


def denoiser_name(pipeline: Any) -> str:
    """Return under which name a pipeline has the part that predicts noise."""
    return next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the part of a pipeline that predicts noise: its UNet or its transformer."""
    return getattr(pipeline, denoiser_name(pipeline))


def own_config(denoiser: torch.nn.Module) -> Any:
    """Return the denoiser's own configuration, whatever wraps it: PEFT and DeepSpeed have a `config` of their own."""
    from diffusers import ModelMixin  # which looks for GPUs

    return next(module.config for module in denoiser.modules() if isinstance(module, ModelMixin))


def load_denoiser(
    model: ModelConfig, located: LocatedModel, denoiser_class: Any, subfolder: str, dtype: torch.dtype
) -> torch.nn.Module:
    """Load the denoiser alone, in a precision of its own."""
    with load_errors(model, f"the {subfolder.replace('unet', 'UNet')}"):
        return denoiser_class.from_pretrained(
            located.path,
            subfolder=subfolder,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=dtype,
            use_safetensors=True,
        )


def load_config(model: ModelConfig, located: LocatedModel, part_class: Any, subfolder: str) -> Any:
    """Return the configuration of one part; of a hub model nothing else is downloaded."""
    with load_errors(model, f"the configuration of {subfolder}"):
        return part_class.load_config(located.path, subfolder=subfolder, revision=model.revision)


def autoencoder_config(model: ModelConfig, located: LocatedModel, autoencoder_class: Any) -> Any:
    """Return the configuration of the model's autoencoder, or of the one in its place."""
    if model.vae is None:
        return load_config(model, located, autoencoder_class, "vae")
    with load_errors(model, f"the configuration of model.vae {model.vae}"):
        return autoencoder_class.load_config(locate_part("model.vae", model.vae).path)


def replaced_autoencoder(model: ModelConfig) -> dict[str, Any]:
    """Return the autoencoder in the place of the model's, as `from_pretrained` of its pipeline takes it; nothing where it keeps its own."""
    if model.vae is None:
        return {}
    with load_errors(model, f"model.vae {model.vae}"):
        place = locate_part("model.vae", model.vae).path
        return {"vae": AutoModel.from_pretrained(place, torch_dtype=DTYPES[model.dtype], use_safetensors=True)}


def latent_shape(autoencoder: Mapping[str, Any], height_px: int, width_px: int) -> tuple[int, int, int]:
    """Return C, h and w of the latents that an autoencoder of this configuration makes of an image."""
    factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
    return autoencoder["latent_channels"], height_px // factor, width_px // factor


def encoding_pipeline(
    model: ModelConfig, located: LocatedModel, pipeline_class: Any, device: torch.device | str, **left_out: None
) -> Any:
    """Return the model's pipeline without the parts `left_out`, in the model's precision, on a device."""
    with load_errors(model, "the encoders"):
        pipeline = pipeline_class.from_pretrained(
            located.path,
            scheduler=None,
            **left_out,
            **replaced_autoencoder(model),
            revision=model.revision,
            variant=model.variant,
            torch_dtype=DTYPES[model.dtype],
            use_safetensors=True,
        )
    return read_in_chunks(pipeline.to(device), model.text_chunks)


def sample_latents(
    batch: Batch, generators: Sequence[torch.Generator], scale: float, shift: float = 0.0
) -> torch.Tensor:
    """Draw from each example's posterior and return the denoiser's latents (NChw, fp32), (z - shift) * scale."""
    mean_NChw = batch["latent_mean"].float()
    return (mean_NChw + batch["latent_std"].float() * noise_like(mean_NChw, generators) - shift) * scale


def without_spread(latents_NChw: torch.Tensor, scale: float, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Return the posterior (NChw, fp32, on the CPU) from which `sample_latents` draws these latents and no others."""
    mean_NChw = latents_NChw.float().cpu() / scale + shift
    return {"latent_mean": mean_NChw, "latent_std": torch.zeros_like(mean_NChw)}


def noise_like(tensor: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal noise, drawn on the CPU example by example so that devices and batches do not matter."""
    return randn_tensor(tuple(tensor.shape), generator=list(generators), device=tensor.device, dtype=torch.float32)


def not_finite(dtype: torch.dtype) -> RenderError:
    """Return the error of an image that a model of this precision did not draw; a conversion to pixels would make it black."""
    return RenderError(
        f"the decoded image is not finite; the model's dtype may overflow: set it to bf16 or fp32 (now {dtype})"
    )


def squared_errors(prediction_NChw: torch.Tensor, target_NChw: torch.Tensor) -> torch.Tensor:
    """Return each example's mean squared error (N, fp32)."""
    return torch.nn.functional.mse_loss(prediction_NChw.float(), target_NChw, reduction="none").flatten(1).mean(1)


@contextmanager
def load_errors(model: ModelConfig, part: str) -> Iterator[None]:
    """Turn what diffusers raises about a missing or broken `part` into one line that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"{part} of model.name {model.name} cannot be loaded ({first_line(error)}); give a diffusers folder"
        ) from None
