"""Rows that are drawn to be learnt from: each with its image, the latents that it was decoded from, and the conditioning it was drawn by.

Shapes: N rows, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from selma_ray.models.batches import HalvingBatches, spare_others
from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.config import SamplingConfig
from selma_ray.models.drawing import Drawing
from selma_ray.models.family import Predictor, open_predictor
from selma_ray.models.rendering import CPU_LANES
from selma_ray.models.schedulers import use_scheduler

__all__ = ["DrawnRow", "RowDrawer", "predict_guided"]

_CPU_PIXELS_AT_ONCE = 2**18
"""Small images are drawn several times as fast in large batches; of large ones the memory would not hold as many."""


@dataclass(frozen=True, eq=False)
class DrawnRow:
    """One image and what it was drawn from."""

    image: Image.Image
    latents: torch.Tensor
    """1Chw, the denoiser's."""
    condition: Condition


class RowDrawer:
    """Draws batches with one pipeline held in memory; the same batch gives the same rows, byte for byte on the CPU in fp32.

    What a row is rounded to depends on its batch, unlike a Renderer's. A batch that does not fit the memory is halved.
    """

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        use_scheduler(pipeline, sampling.scheduler, sampling.scheduler_config)
        self.scheduler = type(pipeline.scheduler).__name__
        self._sampling = sampling
        self._predictor = open_predictor(pipeline)
        self._batches = HalvingBatches()
        if pipeline._execution_device.type == "cpu":
            pixels = sampling.width_px * sampling.height_px
            self._batches.size = max(CPU_LANES, _CPU_PIXELS_AT_ONCE // pixels)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[DrawnRow | Exception]:
        """Return one row per prompt, in order; what cannot be drawn is its error, and spares the others."""
        sampling = self._sampling
        drawings = [
            Drawing(
                prompt, seed, sampling.steps, sampling.guidance_scale, sampling.width_px, sampling.height_px,
                sampling.negative_prompt,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        return spare_others(lambda batch: self._batches.map(self._draw, batch), drawings)

    @torch.inference_mode()
    def _draw(self, drawings: Sequence[Drawing]) -> list[DrawnRow | Exception]:
        conditions = self._predictor.encode(drawings)
        courses = [self._predictor.start(drawing) for drawing in drawings]
        while not courses[0].finished:
            predicted_NChw = predict_guided(
                self._predictor,
                torch.cat([course.model_input() for course in courses]),
                torch.stack([course.timestep for course in courses]),
                drawings[0],
                conditions,
            )
            for course, predicted_1Chw in zip(courses, predicted_NChw.split(1), strict=True):
                course.advance(predicted_1Chw)
        images = self._predictor.decode(torch.cat([course.latents_NCHW for course in courses]))
        return [
            image if isinstance(image, Exception) else DrawnRow(image, course.latents_NCHW, condition.positive)
            for image, course, condition in zip(images, courses, conditions, strict=True)
        ]


def predict_guided(
    predictor: Predictor,
    inputs_NChw: torch.Tensor,
    timesteps_N: torch.Tensor,
    drawing: Drawing,
    conditions: Sequence[Conditions],
) -> torch.Tensor:
    """Return the guided prediction of each row (NChw); all rows are guided as `drawing` is."""
    rows = [each.positive for each in conditions]
    negatives = [each.negative for each in conditions if each.negative is not None]
    if not negatives:
        return predictor.guide(drawing, predictor.predict(inputs_NChw, timesteps_N, rows), None)
    both_NChw, both_N = torch.cat([inputs_NChw] * 2), torch.cat([timesteps_N] * 2)
    predicted_NChw, unconditional_NChw = predictor.predict(both_NChw, both_N, [*rows, *negatives]).chunk(2)
    return predictor.guide(drawing, predicted_NChw, unconditional_NChw)
