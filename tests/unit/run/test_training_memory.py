"""The largest part of a student's step: learning, drawing for all skills at once, or being taught."""

import pytest

from selma_ray.merging.config import DistilConfig
from selma_ray.models.cost import TrainingCost
from selma_ray.models.memory import DrawingCost
from selma_ray.run.training_memory import student_memory_parts

DRAWING = DrawingCost(
    row_bytes=1000, decode_bytes=1, autoencoder_parameters=1, predictions_per_step=2, upcasts=False
)  # fmt: skip


def step_bytes(activation_bytes: int, **distil: float) -> float:
    """Return what a step holds of two bytes a value, with five experts."""
    cost = TrainingCost(
        parameters=900, lora_parameters=100, block_parameters=800, cached_bytes=1, activation_bytes=activation_bytes,
        checkpointed_bytes=1, forward_flops=1, step_flops=2, adapted_parameters=300,
    )  # fmt: skip
    config = DistilConfig.model_validate({"prompts_per_skill": 4, "states_per_image": 2, **distil})
    return student_memory_parts(cost, DRAWING, config, 5, 4, 1800, 2)["a step"]


@pytest.mark.parametrize(
    ("activation_bytes", "distil", "expected"),
    [
        (9000, {}, 4 * 2 * 9000 / 2),  # learning: 8 states, values of half the traced width
        (9000, {"guidance_scale": 4}, 2 * 4 * 2 * 9000 / 2),
        (1, {}, 5 * 4 * 500 + 2 * 300),  # drawing: 20 rows, and a copy of the adapted weights
        (1, {"guidance_scale": 4}, 2 * 5 * 4 * 500 + 2 * 300),
        (1, {"states_per_image": 6, "teacher_guidance_scale": 4}, 2 * 4 * 6 * 500),  # being taught by guided experts
    ],
)
def test_a_step_takes_what_its_largest_part_takes(
    activation_bytes: int, distil: dict[str, float], expected: float
) -> None:
    assert step_bytes(activation_bytes, **distil) == expected
