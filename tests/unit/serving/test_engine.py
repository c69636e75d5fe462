"""The engine's thread: bounded, cancellable, and alive after errors."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selma_ray.errors import ServingError
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_predictor
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import Denoiser, denoiser_for
from selma_ray.serving.engine import Engine
from selma_ray.serving.errors import RequestError
from selma_ray.serving.requests import ImageRequest

WAIT_S = 60


class GatedDenoiser(Denoiser):
    """Waits before every prediction until the gate is open; fails while told to."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(open_predictor(pipeline))
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.broken = False

    def predict(self, *arguments: Any) -> Any:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        if self.broken:
            raise RuntimeError("broken")
        return super().predict(*arguments)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir: Path) -> Any:
    return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")


@pytest.fixture
def denoiser(pipeline: Any) -> GatedDenoiser:
    return GatedDenoiser(pipeline)


@pytest.fixture
def engine(denoiser: GatedDenoiser) -> Iterator[Engine]:
    engine = Engine(StepBatch(denoiser, 2, (64, 64)), max_in_flight=4)
    yield engine
    denoiser.gate.set()
    engine.close()


def request(seed: int = 0, steps: int = 2) -> ImageRequest:
    return ImageRequest("a red ball", seed, steps, 2.0, 64, 64)


def test_all_of_a_call_is_accepted_or_none(engine: Engine, denoiser: GatedDenoiser) -> None:
    accepted = engine.submit([request(seed) for seed in range(3)])
    with pytest.raises(RequestError, match="queue is full") as refusal:
        engine.submit([request(3), request(4)])
    assert refusal.value.status == 429
    accepted += engine.submit([request(3)])
    denoiser.gate.set()
    assert [future.result(WAIT_S).size for future in accepted] == [(64, 64)] * 4
    assert engine.stats().in_flight == 0
    assert engine.stats().images == 4
    assert engine.stats().image_steps == 8
    engine.submit([request()])[0].result(WAIT_S)


def test_a_cancelled_request_makes_room(engine: Engine, denoiser: GatedDenoiser) -> None:
    endless = engine.submit([request(seed, steps=900) for seed in range(4)])
    assert denoiser.reached.wait(WAIT_S)
    for future in endless:
        assert future.cancel()
    denoiser.gate.set()
    while engine.stats().in_flight:
        threading.Event().wait(0.01)
    assert engine.submit([request()])[0].result(WAIT_S).size == (64, 64)
    assert engine.stats().images == 1


def test_an_error_reaches_its_callers_and_the_engine_goes_on(engine: Engine, denoiser: GatedDenoiser) -> None:
    denoiser.broken = True
    denoiser.gate.set()
    with pytest.raises(RuntimeError, match="broken"):
        engine.submit([request()])[0].result(WAIT_S)
    denoiser.broken = False
    assert engine.submit([request()])[0].result(WAIT_S).size == (64, 64)
    engine.check_health(stall_s=WAIT_S)


def test_previews_come_before_the_image_and_are_evenly_spread(engine: Engine, denoiser: GatedDenoiser) -> None:
    shown = []
    previewed = replace(request(steps=8), num_previews=3)
    (plain, future) = engine.submit([request(), previewed], on_preview=lambda *preview: shown.append(preview))
    denoiser.gate.set()
    assert plain.result(WAIT_S).size == future.result(WAIT_S).size == (64, 64)
    assert [(index, preview) for index, preview, _ in shown] == [(1, 0), (1, 1), (1, 2)]
    assert {image.size for _, _, image in shown} == {(64, 64)}
    assert len({image.tobytes() for _, _, image in shown}) == 3


def test_a_caller_that_fails_on_a_preview_stops_nobody(engine: Engine, denoiser: GatedDenoiser) -> None:
    def fail(*preview: Any) -> None:
        raise RuntimeError("gone")

    (future,) = engine.submit([replace(request(), num_previews=1)], on_preview=fail)
    denoiser.gate.set()
    assert future.result(WAIT_S).size == (64, 64)


def test_new_weights_are_for_requests_that_come_later(engine: Engine, denoiser: GatedDenoiser, pipeline: Any) -> None:
    (before,) = engine.submit([request()])
    assert denoiser.reached.wait(WAIT_S)
    other = pipeline.from_pipe(pipeline, unet=deepcopy(pipeline.unet))
    with torch.no_grad():
        other.unet.conv_out.weight.zero_()
    engine.replace_merged(denoiser_for(other))
    (after,) = engine.submit([request()])
    denoiser.gate.set()
    old, new = before.result(WAIT_S), after.result(WAIT_S)
    alone = StepBatch(denoiser_for(pipeline), 2, (64, 64))
    alone.submit(request())
    (outcome,) = [outcome for _ in range(2) for outcome in alone.step()]
    assert old.tobytes() == outcome.image.tobytes() != new.tobytes()


def test_occupancy_is_counted(engine: Engine, denoiser: GatedDenoiser) -> None:
    accepted = engine.submit([request(steps=3), request(steps=1), request(steps=2)])
    denoiser.gate.set()
    for future in accepted:
        future.result(WAIT_S)
    stats = engine.stats()
    assert stats.occupancy == {2: 3}
    assert (stats.steps, stats.image_steps, stats.waiting) == (3, 6, 0)
    assert stats.busy_s > 0


def test_a_stuck_engine_is_not_healthy(engine: Engine, denoiser: GatedDenoiser) -> None:
    engine.check_health(stall_s=0)
    engine.submit([request()])
    assert denoiser.reached.wait(WAIT_S)
    with pytest.raises(ServingError, match="has not taken a step"):
        engine.check_health(stall_s=0)


def test_closing_cancels_what_is_in_flight(pipeline: Any) -> None:
    engine = Engine(StepBatch(denoiser_for(pipeline), 2, (64, 64)), max_in_flight=4)
    (endless,) = engine.submit([request(steps=900)])
    engine.close()
    with pytest.raises(CancelledError):
        endless.result(WAIT_S)
    with pytest.raises(RequestError, match="not available") as refusal:
        engine.submit([request()])
    assert refusal.value.status == 503
    with pytest.raises(ServingError, match="dead"):
        engine.check_health(stall_s=WAIT_S)
