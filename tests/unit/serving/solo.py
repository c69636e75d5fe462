"""Requests drawn together by the step-batching engine, and each alone by diffusers' own pipeline."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selma_ray.serving.batch import Failure, StepBatch
from selma_ray.serving.decoding import Decoder, Latents
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.requests import ImageRequest
from tests.unit.models.measuring import guidance_arguments

__all__ = [
    "FULL_SIZE_PX",
    "Ended",
    "assert_equal_to_solo",
    "in_double",
    "random_request",
    "run_mix",
    "solo_image",
    "stepped",
]

FULL_SIZE_PX = (64, 64)
SIZES_PX = ((64, 64), (32, 64), (96, 64))


@dataclass(frozen=True)
class Ended:
    """A request that has left the batch, decoded."""

    ticket: int
    image: Any = None
    error: Exception | None = None


def stepped(batch: StepBatch) -> list[Ended]:
    """Take a step and decode what is finished."""
    ended = []
    for outcome in batch.step():
        if isinstance(outcome, Failure):
            ended.append(Ended(outcome.ticket, error=outcome.error))
        elif isinstance(outcome, Latents) and outcome.preview is None:
            (image,) = Decoder().decode([outcome])
            error = image if isinstance(image, Exception) else None
            ended.append(Ended(outcome.ticket, None if error else image, error))
    return ended


def random_request(rng: random.Random) -> ImageRequest:
    height_px, width_px = rng.choice(SIZES_PX)
    return ImageRequest(
        prompt=rng.choice(["a red ball", "two blue cups", "a cat left of a dog", "x"]),
        seed=rng.randrange(2**40),
        steps=rng.randint(1, 6),
        guidance_scale=rng.choice([0.0, 1.0, 2.5, 7.5]),
        width_px=width_px,
        height_px=height_px,
        negative_prompt=rng.choice(["", "blurry"]),
    )


def in_double(pipeline: Any) -> Any:
    """Let a pipeline draw in float64, where rows drawn beside others are the same pixels on every CPU.

    Kernels round a row by the rows beside it, and random experts make much of it: in float32 a pixel is off by 1 to 3 of 255.
    """
    return pipeline.to(torch.float64)


def solo_image(pipeline: Any, request: ImageRequest) -> np.ndarray:
    """Draw a request by diffusers' own call."""
    image = pipeline(
        prompt=request.prompt,
        num_inference_steps=request.steps,
        **guidance_arguments(pipeline, request.guidance_scale, request.negative_prompt),
        width=request.width_px,
        height=request.height_px,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]
    return np.asarray(image, dtype=int)


def run_mix(batch: StepBatch, requests: list[ImageRequest], rng: random.Random) -> dict[int, np.ndarray]:
    """Submit at random moments, step until all is done; returns images by position."""
    pending, tickets, images = list(enumerate(requests)), {}, {}
    while pending or len(batch):
        while pending and (not len(batch) or rng.random() < 0.5):
            index, request = pending.pop(0)
            tickets[batch.submit(request)] = index
        for outcome in stepped(batch):
            assert outcome.error is None
            images[tickets[outcome.ticket]] = np.asarray(outcome.image, dtype=int)
    return images


def assert_equal_to_solo(pipeline: Any, requests: list[ImageRequest], rng: random.Random) -> None:
    images = run_mix(StepBatch(denoiser_for(pipeline), rng.randint(1, 6), FULL_SIZE_PX), requests, rng)
    for index, request in enumerate(requests):
        assert np.abs(images[index] - solo_image(pipeline, request)).max() <= 1, request
