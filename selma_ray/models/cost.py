"""What a training step and a prediction cost, found by tracing them on tensors without memory: parameters, bytes, FLOPs.

Nothing is downloaded but configurations, and nothing is computed: the model's own loss runs on the meta device.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.models.locate import LocatedModel, locate_text_to_image
from selma_ray.models.parts import autoencoder_config, load_config, load_errors
from selma_ray.models.quantised import quantised_linears

__all__ = ["TrainingCost", "empty_part", "pipeline_parameters", "training_cost"]

_LIBRARIES: dict[str | None, Any] = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True)
class TrainingCost:
    """Figures of one example of one model at one size, activations in fp32."""

    parameters: int
    """Weights of the denoiser."""
    lora_parameters: int
    """Weights of the adapter."""
    block_parameters: int
    """Weights of the denoiser's that `experts.base_weights` keeps in fewer bits."""
    cached_bytes: int
    """Encoded example: latents and text."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, and two gradients as large as the largest of it."""
    checkpointed_bytes: int
    """The same with gradient checkpointing, and at most the largest block computed again."""
    forward_flops: int
    """One prediction of the denoiser."""
    step_flops: int
    """Forward and backward pass."""
    predictions_per_step: int = 2
    """Predictions of a guided sampling step."""
    guides_above: float = 1.0
    """Guidance scale above which a step is guided."""
    adapted_parameters: int = 0
    """Weights of the modules that the adapter changes, of which there is a second copy where it is folded in."""

    def predictions(self, guidance_scale: float) -> int:
        """Return the predictions of a sampling step at a guidance scale."""
        return self.predictions_per_step if guidance_scale > self.guides_above else 1


def training_cost(
    model: ModelConfig, height_px: int, width_px: int, rank: int, targets: tuple[str, ...]
) -> TrainingCost:
    """Return what training a LoRA of `rank` on an image of the given size costs; raises ModelNotFoundError without a configuration."""
    family = open_family(model)
    shapes = family.example_shapes(height_px, width_px)
    with torch.device("meta"):
        denoiser = family.empty_denoiser()
        parameters = _count(denoiser)
        in_blocks = sum(layer.weight.numel() for layer in quantised_linears(denoiser).values())
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        adapted: Any = get_peft_model(denoiser, config).train()
    batch = {name: torch.empty((1, *shape), device="meta") for name, shape in shapes.items()}
    kept = _Trace()
    with _exact_attention(), FlopCounterMode(display=False) as flops, kept.watching(denoiser):
        loss = family.errors(adapted, batch, [torch.Generator().manual_seed(0)]).mean()
        forward_flops = flops.get_total_flops()
        loss.backward()
        step_flops = flops.get_total_flops()
    denoiser.enable_gradient_checkpointing()
    checkpointed = _Trace()
    with _exact_attention(), checkpointed.watching(denoiser):
        family.errors(adapted, batch, [torch.Generator().manual_seed(0)])
    gradients_bytes = 2 * kept.largest_bytes
    return TrainingCost(
        parameters=parameters,
        lora_parameters=sum(each.numel() for each in adapted.parameters() if each.requires_grad),
        block_parameters=in_blocks,
        cached_bytes=sum(tensor.numel() * tensor.element_size() for tensor in batch.values()),
        activation_bytes=kept.total_bytes + gradients_bytes,
        checkpointed_bytes=min(checkpointed.total_bytes + kept.largest_block_bytes, kept.total_bytes) + gradients_bytes,
        forward_flops=forward_flops,
        step_flops=step_flops,
        predictions_per_step=family.predictions_per_step,
        guides_above=family.guides_above,
        adapted_parameters=sum(
            layer.get_base_layer().weight.numel() for layer in adapted.modules() if isinstance(layer, LoraLayer)
        ),
    )


def pipeline_parameters(model: ModelConfig) -> dict[str, int]:
    """Return the number of weights of each part of a pipeline, from its configurations alone."""
    located = locate_text_to_image(model.name, model.revision)
    return {
        name: _count(_empty(model, located, name, part_class))
        for name, part_class in _part_classes(model, located).items()
    }


def empty_part(model: ModelConfig, located: LocatedModel, name: str) -> torch.nn.Module:
    """Return a part of a pipeline on the meta device, as its configuration says."""
    return _empty(model, located, name, _part_classes(model, located)[name])


def _part_classes(model: ModelConfig, located: LocatedModel) -> dict[str, Any]:
    with load_errors(model, "the pipeline's index"):
        index = DiffusionPipeline.load_config(located.path, revision=model.revision)
    classes = {}
    for name, entry in index.items():
        library, class_name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else ("", "")
        part_class = getattr(_LIBRARIES.get(library), class_name or "", None)
        if isinstance(part_class, type) and issubclass(part_class, torch.nn.Module):
            classes[name] = part_class
    return classes


def _empty(model: ModelConfig, located: LocatedModel, name: str, part_class: Any) -> torch.nn.Module:
    with torch.device("meta"), load_errors(model, f"the configuration of {name}"):
        if issubclass(part_class, transformers.PreTrainedModel):
            config_class: Any = part_class.config_class
            return part_class(
                config_class.from_pretrained(located.path, subfolder=name, revision=model.revision or "main")
            )
        if name == "vae":
            return part_class.from_config(autoencoder_config(model, located, part_class))
        return part_class.from_config(load_config(model, located, part_class, name))


class _Trace:
    """Counts the storage that autograd keeps, once for all views of it, and how much of it each block adds."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}
        self.total_bytes = 0
        self.largest_bytes = 0
        self.largest_block_bytes = 0

    @contextmanager
    def watching(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """Count while a loss is computed; weights do not count."""
        weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and storage._cdata not in self._kept:
                self._kept[storage._cdata] = storage  # held, so that no other storage takes its address
                self.total_bytes += storage.nbytes()
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
            return tensor

        handles = [handle for block in _blocks(denoiser) for handle in self._hooks(block)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def _hooks(self, block: torch.nn.Module) -> list[Any]:
        before = [0]

        def enter(*_: Any) -> None:
            before[0] = self.total_bytes

        def leave(*_: Any) -> None:
            self.largest_block_bytes = max(self.largest_block_bytes, self.total_bytes - before[0])

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def _blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    lists = [child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList)]
    return [block for each in lists for block in each]


class _Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep (inputs and output, no attention matrix) and counts what they compute."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query @ key.transpose(-1, -2) @ value
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, _ = ctx.saved_tensors
        weights = query @ key.transpose(-1, -2)
        of_weights = gradients[0] @ value.transpose(-1, -2)
        return of_weights @ key, of_weights.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradients[0]


class _exact_attention(TorchFunctionMode):  # noqa: N801
    """Traces attention as fused kernels compute it: on the meta device PyTorch takes the one that keeps attention matrices."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])
        return function(*args, **(kwargs or {}))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
