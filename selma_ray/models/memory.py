"""What drawing an image and holding a language model take of a card's memory, found on tensors without memory.

Nothing is downloaded but configurations, and nothing is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selma_ray.errors import ModelNotFoundError, first_line
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import empty_part
from selma_ray.models.family import open_family
from selma_ray.models.published_language import PUBLISHED_LANGUAGE, published_language_config

__all__ = ["DrawingCost", "LanguageModelCost", "drawing_cost", "language_model_cost"]


@dataclass(frozen=True)
class DrawingCost:
    """Figures of one image of one model at one size, in fp32."""

    row_bytes: int
    """Most that one row of a prediction holds beside the weights."""
    decode_bytes: int
    """Most that decoding the latents holds beside the weights."""
    autoencoder_parameters: int
    """Weights of the autoencoder."""
    predictions_per_step: int
    """Rows of a guided sampling step."""
    upcasts: bool
    """Whether the autoencoder is put into fp32 to decode what is drawn in fp16."""
    guides_above: float = 1.0
    """Guidance scale above which a step is guided."""

    def rows(self, guidance_scale: float) -> int:
        """Return the rows of a sampling step at a guidance scale."""
        return self.predictions_per_step if guidance_scale > self.guides_above else 1


@dataclass(frozen=True)
class LanguageModelCost:
    """Figures of a language model, with or without eyes."""

    parameters: int
    """Its weights."""
    cache_values_per_token: int
    """Keys and values kept for each token."""


def drawing_cost(model: ModelConfig, height_px: int, width_px: int) -> DrawingCost:
    """Return what drawing an image takes; raises ModelNotFoundError without a configuration, ConfigError for no known family.

    Tiled decoding holds one tile, of the size that the autoencoder was made for.
    """
    family = open_family(model)
    with torch.device("meta"):
        denoiser = family.empty_denoiser()
    autoencoder: Any = empty_part(model, family.located, "vae")
    shapes = family.example_shapes(height_px, width_px)
    batch = {name: torch.empty((1, *shape), device="meta") for name, shape in shapes.items()}
    sample_px = _tile_px(autoencoder) if model.vae_tiling else None
    tile_px = (min(height_px, sample_px), min(width_px, sample_px)) if sample_px else (height_px, width_px)
    latents = torch.empty((1, *family.decoded_shape(*tile_px)), device="meta")
    with torch.no_grad():
        row_bytes = _peak_bytes(denoiser, lambda: family.errors(denoiser, batch, [torch.Generator().manual_seed(0)]))
        decode_bytes = _peak_bytes(autoencoder, lambda: autoencoder.decode(latents, return_dict=False))
    return DrawingCost(
        row_bytes=row_bytes,
        decode_bytes=decode_bytes,
        autoencoder_parameters=sum(each.numel() for each in autoencoder.parameters()),
        predictions_per_step=family.predictions_per_step,
        guides_above=family.guides_above,
        upcasts=family.upcasts_autoencoder and bool(autoencoder.config.force_upcast),
    )


def _tile_px(autoencoder: Any) -> int | None:
    return autoencoder.config.get("sample_size") or getattr(autoencoder, "tile_sample_min_height", None)


def language_model_cost(path: str, revision: str | None = None) -> LanguageModelCost:
    """Return what a language model's configuration says of its size; raises ModelNotFoundError where it cannot be read."""
    try:
        config = (
            published_language_config(path)
            if path in PUBLISHED_LANGUAGE
            else transformers.AutoConfig.from_pretrained(path, revision=revision or "main")
        )
        model_class: Any = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model = model_class(config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(
            f"{path} has no configuration that transformers reads ({first_line(error)}); name a model of transformers"
        ) from None
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = sum(each.numel() for each in model.parameters())
    return LanguageModelCost(parameters, 2 * text.num_hidden_layers * heads * head_width)


def _peak_bytes(module: torch.nn.Module, call: Any) -> int:
    """Return the most that a call holds at once, beside the weights of the module."""
    peak = _Peak({each.untyped_storage()._cdata for each in (*module.parameters(), *module.buffers())})
    with _FusedAttention(), peak:
        call()
    return peak.bytes


class _Peak(TorchDispatchMode):
    """Follows the storages that operators make until they are freed."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.bytes = 0
        self._weights = weights
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self._held.values()))
        return output


class _FusedAttention(TorchFunctionMode):
    """Attention that holds its output alone, as fused kernels do: on the meta device PyTorch takes the one with attention matrices."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            return named["query"].new_empty((*named["query"].shape[:-1], named["value"].shape[-1]))
        return function(*args, **(kwargs or {}))
