"""What fitting adapters holds of a GPU's memory, counted from what a step costs."""

from typing import TYPE_CHECKING

from selma_ray.experts.config import GRADIENTS_AT_ONCE, ExpertsConfig

if TYPE_CHECKING:  # which loads torch
    from selma_ray.models.cost import TrainingCost

__all__ = ["VALUE_BYTES", "training_memory_parts"]

VALUE_BYTES = {"fp32": 4, "auto": 4, "bf16": 2, "fp16": 2}
"""Bytes of a value by the name of its precision; `auto` at its largest."""

_BASE_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2 + 8 / 256, "prodigy": 16, "adafactor": 0}


def training_memory_parts(cost: "TrainingCost", config: ExpertsConfig) -> dict[str, float]:
    """Return the bytes that a worker holds: frozen weights, adapter with gradients, optimiser's state, masters, average, activations.

    ZeRO 1 and up exchange gradients through a buffer and split the optimiser's state over workers, 2 and up the gradients, 3 the weights.
    """
    width, workers = VALUE_BYTES[config.precision], config.workers_per_expert
    micro_batch = config.micro_batch_size or config.batch_size // workers
    masters = 0 if width == 4 else 4
    split = [workers if config.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    in_blocks = cost.block_parameters * _BASE_BYTES.get(config.base_weights, width)
    base = (cost.parameters - cost.block_parameters) * width + in_blocks
    gradients = width * cost.lora_parameters / split[1]
    if config.zero_stage:
        gradients += width * min(cost.lora_parameters, GRADIENTS_AT_ONCE)
    optimizer = (_STATE_BYTES[config.optimizer] + masters) * cost.lora_parameters / split[0]
    average = 4 * cost.lora_parameters if config.ema else 0
    activations = cost.checkpointed_bytes if config.gradient_checkpointing else cost.activation_bytes
    images = micro_batch * (2 if config.dpo else 1)
    return {
        "weights": (base + width * cost.lora_parameters) / split[2],
        "gradients and optimiser": gradients + optimizer + average,
        "activations": images * activations * width / 4,
    }
