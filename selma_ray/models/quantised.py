"""A frozen denoiser in 8 or 4 bits a weight, for adapters to be fitted on it (QLoRA, 2305.14314, section 3), by bitsandbytes."""

from typing import Any, Literal

import torch

from selma_ray.errors import ConfigError

__all__ = ["QuantisedWeights", "quantise", "quantised_linears"]

QuantisedWeights = Literal["int8", "nf4"]
"""`int8` has a scale for each row, `nf4` quantiles of the normal distribution and a scale for each 64 weights."""


def quantise(denoiser: torch.nn.Module, weights: QuantisedWeights, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a denoiser's repeated blocks; their weights lose their bits when they are moved to a device.

    Raises ConfigError where bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"experts.base_weights={weights} needs bitsandbytes ({error}); install it, or set experts.base_weights=full"
        ) from None
    modules = dict(denoiser.named_modules())
    for name, linear in quantised_linears(denoiser).items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, _quantised(bitsandbytes, linear, weights, compute_dtype))
    # PEFT asks the model which of bitsandbytes' layers it holds.
    setattr(denoiser, "is_loaded_in_8bit" if weights == "int8" else "is_loaded_in_4bit", True)


def quantised_linears(denoiser: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the layers that `quantise` replaces, by name: those inside lists of blocks, which hold nearly all weights."""
    lists = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.ModuleList)]
    prefixes = tuple(f"{name}." for name in lists)
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefixes)
    }


def _quantised(
    bitsandbytes: Any, linear: torch.nn.Linear, weights: QuantisedWeights, compute_dtype: torch.dtype
) -> torch.nn.Linear:
    shape, bias, nn = (linear.in_features, linear.out_features), linear.bias is not None, bitsandbytes.nn
    # Made without weights, which take those of the layer as they are: drawing others, in fp32, took twice the memory of bf16.
    with torch.device("meta"):
        if weights == "int8":
            layer = nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        else:
            layer = nn.Linear4bit(*shape, bias=bias, compute_dtype=compute_dtype, quant_type="nf4")
    if weights == "int8":
        layer.weight = nn.Int8Params(linear.weight.data, has_fp16_weights=False, requires_grad=False)
    else:
        layer.weight = nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    return layer.requires_grad_(False)
