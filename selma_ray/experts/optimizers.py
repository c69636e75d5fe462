"""Optimisers by name, each from the library that keeps it."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

from selma_ray.errors import ConfigError
from selma_ray.experts.config import ExpertsConfig

__all__ = ["open_optimizer"]

_BETAS = (0.9, 0.999)


def open_optimizer(parameters: Sequence[torch.nn.Parameter], config: ExpertsConfig) -> torch.optim.Optimizer:
    """Return the optimiser that `config` names, over the trainable weights; raises ConfigError where its library is missing."""
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, betas=_BETAS, weight_decay=decay)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
        case "adamw8bit":
            return _bitsandbytes().optim.AdamW8bit(parameters, lr=rate, betas=_BETAS, weight_decay=decay)
        case "prodigy":
            # As its authors advise for diffusion models: bias correction, and warm-up left out of the estimate.
            options: dict[str, Any] = {"use_bias_correction": True, "safeguard_warmup": True}
            with redirect_stdout(StringIO()):  # it prints
                return _prodigy()(parameters, lr=rate, betas=_BETAS, weight_decay=decay, **options)


def _prodigy() -> Any:
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ConfigError(
            "experts.optimizer prodigy needs the library prodigyopt; install it on every node, or take adamw"
        ) from None
    return Prodigy


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            "experts.optimizer adamw8bit needs the library bitsandbytes; install it on every node, or take adamw"
        ) from None
    return bitsandbytes
