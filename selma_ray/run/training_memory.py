"""What fitting experts, and a student that they teach, holds of a GPU's memory, counted from what a step costs."""

from typing import TYPE_CHECKING

from selma_ray.experts.config import GRADIENTS_AT_ONCE, ExpertsConfig
from selma_ray.merging.config import DistilConfig

if TYPE_CHECKING:  # which loads torch
    from selma_ray.models.cost import TrainingCost
    from selma_ray.models.memory import DrawingCost

__all__ = ["VALUE_BYTES", "student_memory_parts", "training_memory_parts"]

VALUE_BYTES = {"fp32": 4, "auto": 4, "bf16": 2, "fp16": 2}
"""Bytes of a value by the name of its precision; `auto` at its largest."""

_BASE_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2 + 8 / 256, "prodigy": 16, "adafactor": 0}


def training_memory_parts(cost: "TrainingCost", config: ExpertsConfig, experts: int = 1) -> dict[str, float]:
    """Return the bytes that a worker holds: frozen weights, adapter with gradients, optimiser's state, masters, average, activations.

    ZeRO 1 and up exchange gradients through a buffer and split the optimiser's state over workers, 2 and up the gradients, 3 the weights.
    `experts` that are fused are all in one worker, each with a batch of its own.
    """
    width, workers = VALUE_BYTES[config.precision], config.workers_per_expert
    micro_batch = config.micro_batch_size or config.batch_size // workers
    masters = 0 if width == 4 else 4
    split = [workers if config.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    trained = experts * cost.lora_parameters
    in_blocks = cost.block_parameters * _BASE_BYTES.get(config.base_weights, width)
    base = (cost.parameters - cost.block_parameters) * width + in_blocks
    gradients = width * trained / split[1]
    if config.zero_stage:
        gradients += width * min(trained, GRADIENTS_AT_ONCE)
    optimizer = (_STATE_BYTES[config.optimizer] + masters) * trained / split[0]
    average = 4 * trained if config.ema else 0
    old = width * trained if config.nft else 0  # the adapters that draw, which learning needs beside the new ones
    activations = cost.checkpointed_bytes if config.gradient_checkpointing else cost.activation_bytes
    images = experts * micro_batch * (2 if config.dpo else 1)
    return {
        "weights": (base + width * trained) / split[2],
        "gradients and optimiser": gradients + optimizer + average + old,
        "activations": images * activations * width / 4,
    }


def student_memory_parts(
    cost: "TrainingCost",
    drawing: "DrawingCost",
    config: DistilConfig,
    experts: int,
    expert_rank: int,
    model_bytes: float,
    width: int,
) -> dict[str, float]:
    """Return the bytes that the process of `merging.method: distil` holds: a pipeline, its experts, a student, a step's largest part.

    In a step the student draws for all skills at once, folded into a copy of the weights; then each skill in turn is taught, and learns.
    A student without a rank of its own has that of all experts together. Values are of `width` bytes, the student's of 4 with its
    gradients and AdamW's state.
    """
    student = cost.lora_parameters * (config.rank or experts * expert_rank) / expert_rank
    states = config.prompts_per_skill * config.states_per_image
    rows = drawing.rows(config.guidance_scale)
    taught_rows = rows if config.teacher_guidance_scale is None else drawing.rows(config.teacher_guidance_scale)
    row_bytes = drawing.row_bytes * width / 4
    draws = experts * config.prompts_per_skill * rows * row_bytes + width * cost.adapted_parameters
    is_taught = states * max(rows, taught_rows) * row_bytes
    learns = states * rows * cost.activation_bytes * width / 4
    return {
        "weights": model_bytes,
        "experts": width * experts * cost.lora_parameters,
        "student and optimiser": 16 * student,
        "a step": max(draws, is_taught, learns),
    }
