"""The step-batching engine draws what diffusers' own pipeline draws, whatever else is in the batch."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.schedulers import use_scheduler
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.errors import RequestError
from selma_ray.serving.requests import ImageRequest
from tests.tiny_models import save_tiny_sdxl, save_tiny_stable_diffusion
from tests.unit.serving.solo import (
    FULL_SIZE_PX,
    assert_equal_to_solo,
    random_request,
    run_mix,
    solo_image,
    stepped,
)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir: Path) -> StableDiffusionPipeline:
    return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")


@pytest.mark.parametrize("seed", range(8))
def test_random_mixes_equal_the_pipeline_itself(pipeline: StableDiffusionPipeline, seed: int) -> None:
    rng = random.Random(seed)
    assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(8)], rng)


@pytest.mark.heavy
def test_two_hundred_random_mixes_equal_the_pipeline_itself(pipeline: StableDiffusionPipeline) -> None:
    for seed in range(100, 300):
        rng = random.Random(seed)
        assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(6)], rng)


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_every_scheduler_keeps_its_own_state(tiny_pipeline_dir: Path, scheduler: str) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    use_scheduler(pipeline, scheduler)
    rng = random.Random(0)
    assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(5)], rng)


def test_a_scheduler_that_changes_its_timesteps(tiny_pipeline_dir: Path) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    rng = random.Random(0)
    assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(5)], rng)


def test_steps_that_a_scheduler_cannot_take_are_the_callers_error(tiny_pipeline_dir: Path) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    use_scheduler(pipeline, "PNDMScheduler")
    batch = StepBatch(denoiser_for(pipeline), 2, FULL_SIZE_PX)
    batch.submit(square(steps=2))
    (outcome,) = stepped(batch)
    assert isinstance(outcome.error, RequestError)
    assert (outcome.error.status, outcome.error.param) == (400, "num_inference_steps")


def test_more_steps_than_the_model_has_timesteps_are_the_callers_error(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(denoiser_for(pipeline), 2, FULL_SIZE_PX)
    batch.submit(square(steps=1000))  # with its steps_offset, the first timestep would be the 1001st
    (outcome,) = stepped(batch)
    assert isinstance(outcome.error, RequestError)
    assert (outcome.error.status, outcome.error.param) == (400, "num_inference_steps")


def test_v_prediction(tmp_path: Path) -> None:
    save_tiny_stable_diffusion(tmp_path, prediction_type="v_prediction")
    pipeline = load_pipeline(ModelConfig(name=str(tmp_path)), "cpu")
    rng = random.Random(1)
    assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(6)], rng)


@pytest.mark.parametrize("zero_negative", [True, False])
def test_sdxl(tmp_path: Path, zero_negative: bool) -> None:
    save_tiny_sdxl(tmp_path)
    pipeline = load_pipeline(ModelConfig(name=str(tmp_path)), "cpu")
    pipeline.register_to_config(force_zeros_for_empty_prompt=zero_negative)
    rng = random.Random(2)
    assert_equal_to_solo(pipeline, [random_request(rng) for _ in range(6)], rng)


def square(steps: int, size_px: int = 64, seed: int = 0) -> ImageRequest:
    return ImageRequest("a red ball", seed, steps, 2.0, size_px, size_px)


def ended(batch: StepBatch, num_steps: int) -> list[int]:
    return [outcome.ticket for _ in range(num_steps) for outcome in stepped(batch)]


def test_requests_join_and_leave_between_steps(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(denoiser_for(pipeline), 8, FULL_SIZE_PX)
    long = batch.submit(square(steps=5))
    assert ended(batch, 2) == []
    short = batch.submit(square(steps=2))
    assert ended(batch, 2) == [short]
    assert ended(batch, 1) == [long]
    assert len(batch) == 0
    assert stepped(batch) == []


def test_waiting_requests_are_admitted_in_order(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(denoiser_for(pipeline), 2, FULL_SIZE_PX)
    tickets = [batch.submit(square(steps=2, seed=seed)) for seed in range(5)]
    assert ended(batch, 6) == tickets
    assert batch.num_moved == 1  # the fifth was alone in its steps


def test_larger_sizes_share_a_step_with_fewer(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(denoiser_for(pipeline), 8, FULL_SIZE_PX)
    assert [batch.slots((side, side)) for side in (32, 64, 128, 1024)] == [8, 8, 2, 1]


def test_cancelling_frees_the_slot_at_the_next_step(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(denoiser_for(pipeline), 1, FULL_SIZE_PX)
    first, waiting, last = (batch.submit(square(steps=3, seed=seed)) for seed in range(3))
    batch.step()
    batch.cancel([first, waiting])
    assert ended(batch, 3) == [last]
    assert len(batch) == 0


class FailingDenoiser:
    """Wraps a denoiser; fails on marked prompts, or on every prediction while told to."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self._inner = denoiser_for(pipeline)
        self.error: Exception | None = None
        self.broken_decoder = False
        self.most_rows = 99
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, requests: Any) -> Any:
        if any(request.prompt == "unspeakable" for request in requests):
            raise ValueError("unspeakable")
        return self._inner.encode(requests)

    def predict(self, inputs_NCHW: Any, *arguments: Any) -> Any:
        self.rows.append(len(inputs_NCHW))
        if self.error:
            raise self.error
        if len(inputs_NCHW) > self.most_rows:
            raise torch.OutOfMemoryError(f"{len(inputs_NCHW)} rows do not fit")
        return self._inner.predict(inputs_NCHW, *arguments)

    def decode(self, latents_NCHW: Any) -> Any:
        if self.broken_decoder:
            raise RuntimeError("undecodable")
        return self._inner.decode(latents_NCHW)


def test_a_request_that_cannot_start_fails_alone(pipeline: StableDiffusionPipeline) -> None:
    batch = StepBatch(FailingDenoiser(pipeline), 4, FULL_SIZE_PX)  # type: ignore[arg-type]
    good = [batch.submit(square(steps=1, seed=seed)) for seed in range(2)]
    bad = batch.submit(ImageRequest("unspeakable", 0, 1, 2.0, 64, 64))
    outcomes = {outcome.ticket: outcome for outcome in stepped(batch)}
    assert str(outcomes[bad].error) == "unspeakable"
    assert all(outcomes[ticket].image is not None for ticket in good)


def test_a_failed_step_ends_its_requests_and_no_others(pipeline: StableDiffusionPipeline) -> None:
    denoiser = FailingDenoiser(pipeline)
    batch = StepBatch(denoiser, 1, FULL_SIZE_PX)  # type: ignore[arg-type]
    failed, later = batch.submit(square(steps=2)), batch.submit(square(steps=2, seed=1))
    denoiser.error = RuntimeError("broken")
    (outcome,) = stepped(batch)
    assert (outcome.ticket, str(outcome.error)) == (failed, "broken")
    denoiser.error = None
    assert ended(batch, 2) == [later]


@pytest.mark.parametrize("most_rows", [5, 2, 1])
def test_a_step_that_does_not_fit_the_memory_is_taken_in_parts(
    pipeline: StableDiffusionPipeline, most_rows: int
) -> None:
    denoiser = FailingDenoiser(pipeline)
    denoiser.most_rows = most_rows
    rng = random.Random(most_rows)
    requests = [replace(random_request(rng), width_px=64, height_px=64, steps=3) for _ in range(4)]
    images = run_mix(StepBatch(denoiser, 4, FULL_SIZE_PX), requests, rng)  # type: ignore[arg-type]
    for index, request in enumerate(requests):
        assert np.abs(images[index] - solo_image(pipeline, request)).max() <= 1
    failed = [rows for rows in denoiser.rows if rows > most_rows]
    assert failed, "nothing was too large"
    assert len(failed) <= 3, "what did not fit once is not tried again"


def test_a_size_of_which_no_row_fits_is_refused_with_its_reason_and_spares_the_others(
    pipeline: StableDiffusionPipeline,
) -> None:
    denoiser = FailingDenoiser(pipeline)
    batch = StepBatch(denoiser, 2, FULL_SIZE_PX)  # type: ignore[arg-type]
    large = batch.submit(square(steps=1, size_px=96))
    denoiser.most_rows = 0
    (outcome,) = stepped(batch)
    assert isinstance(outcome.error, RequestError)
    assert (outcome.ticket, outcome.error.code) == (large, "out_of_memory")
    assert "96x96" in str(outcome.error)
    denoiser.most_rows = 9
    small = batch.submit(square(steps=1))
    assert ended(batch, 1) == [small]


class Clock:
    """Seconds that pass when the denoiser is called: as many as the latents have thousands of elements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, denoiser: Any) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("selma_ray.serving.timing.time.perf_counter", lambda: self.now_s)
        predict = denoiser.predict

        def slow(inputs_NCHW: Any, *arguments: Any) -> Any:
            self.now_s += inputs_NCHW.numel() / 1000
            return predict(inputs_NCHW, *arguments)

        denoiser.predict = slow


def steps_until(batch: StepBatch, ticket: int, clock: Clock) -> float:
    """Return the seconds after which a request is finished."""
    while all(outcome.ticket != ticket for outcome in stepped(batch)):
        pass
    return clock.now_s


def test_lanes_share_the_time_and_not_the_steps(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = denoiser_for(pipeline)
    clock = Clock(monkeypatch, denoiser)
    batch = StepBatch(denoiser, 1, FULL_SIZE_PX)
    alone_s = steps_until(batch, batch.submit(square(steps=20, size_px=32)), clock)
    for seed in range(3):
        batch.submit(square(steps=20, size_px=256, seed=seed))
    large_step_s = 2 * 4 * 64 * 64 / 1000
    batch.step()
    started_s = clock.now_s
    small = batch.submit(square(steps=20, size_px=32))
    beside_s = steps_until(batch, small, clock) - started_s
    # A large step costs as much as three small images: at most one comes between.
    assert large_step_s > 3 * alone_s
    assert beside_s <= alone_s + large_step_s
    again = batch.submit(square(steps=20, size_px=32))
    started_s = clock.now_s
    assert steps_until(batch, again, clock) - started_s <= alone_s + large_step_s, "idle time is no credit and no debt"


def test_lanes_share_the_time_by_weight(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = denoiser_for(pipeline)
    clock = Clock(monkeypatch, denoiser)
    batch = StepBatch(denoiser, 1, FULL_SIZE_PX, size_weights={(32, 64): 3.0})
    first, second = batch.submit(square(steps=20)), batch.submit(ImageRequest("a red ball", 0, 20, 2.0, 64, 32))
    steps = {first: 0, second: 0}
    for _ in range(20):
        batch.step()
    running = {each.ticket: each.course.steps_done for lane in batch._lanes.values() for each in lane.running}
    steps |= running
    step_s = 2 * 4 * 16 * 16 / 1000
    assert clock.now_s > 0
    shares = steps[first] * step_s, steps[second] * step_s / 2
    assert shares[1] == pytest.approx(3 * shares[0], rel=0.5)


def test_a_failed_decoding_ends_what_was_finished_and_no_others(pipeline: StableDiffusionPipeline) -> None:
    denoiser = FailingDenoiser(pipeline)
    batch = StepBatch(denoiser, 2, FULL_SIZE_PX)  # type: ignore[arg-type]
    finished, later = batch.submit(square(steps=1)), batch.submit(square(steps=2))
    denoiser.broken_decoder = True
    (outcome,) = stepped(batch)
    assert (outcome.ticket, str(outcome.error)) == (finished, "undecodable")
    denoiser.broken_decoder = False
    assert ended(batch, 1) == [later]


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline.*got object"):
        denoiser_for(object())
