"""Training precision, and DeepSpeed's configuration."""

from typing import Any, Literal

import torch

from selma_ray.experts.config import GRADIENTS_AT_ONCE, ExpertsConfig

__all__ = ["deepspeed_config", "resolve_drawing_precision", "resolve_precision"]


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """Return the precision that `auto` stands for on a device; any other is returned as it is.

    bf16 needs units of its own: CUDA from compute capability 8.0, or AMX. A CPU with AVX512-BF16 alone fits the miniature
    hardly faster in bf16 than in fp32, and fp32 resumes to the bit.
    """
    if precision != "auto":
        return precision  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def resolve_drawing_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """Return the precision that `auto` stands for where images of rounds are drawn; any other is returned as it is.

    It is that of training, and bf16 on a CPU with AVX512-BF16 too: drawing has no backward pass, and gains there what fitting does not.
    """
    if precision == "auto" and device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return "bf16"
    return resolve_precision(precision, device)


def deepspeed_config(config: ExpertsConfig, precision: str, trainable: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of an expert's engine with so many trainable weights."""
    share = config.batch_size // config.workers_per_expert
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size or share,
        "gradient_clipping": config.gradient_clip,
        # DeepSpeed holds a buffer of this many gradients, by default of half a billion: a gigabyte beside any adapter.
        "zero_allow_untested_optimizer": config.optimizer != "adamw",  # each is tested here against a plain loop
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(trainable, GRADIENTS_AT_ONCE)},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": None,
    }
