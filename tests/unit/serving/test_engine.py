"""The engine's thread: bounded, cancellable, and alive after errors."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from selma_ray.errors import ServingError
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoisers import StableDiffusionDenoiser
from selma_ray.serving.engine import Engine
from selma_ray.serving.errors import RequestError
from selma_ray.serving.requests import ImageRequest

WAIT_S = 60


class GatedDenoiser(StableDiffusionDenoiser):
    """Waits before every prediction until the gate is open; fails while told to."""

    def __init__(self, pipeline) -> None:
        super().__init__(pipeline)
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.broken = False

    def predict(self, *arguments):
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        if self.broken:
            raise RuntimeError("broken")
        return super().predict(*arguments)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir: Path):
    return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)))


@pytest.fixture
def denoiser(pipeline) -> GatedDenoiser:
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
    endless = engine.submit([request(seed, steps=1000) for seed in range(4)])
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


def test_a_stuck_engine_is_not_healthy(engine: Engine, denoiser: GatedDenoiser) -> None:
    engine.check_health(stall_s=0)
    engine.submit([request()])
    assert denoiser.reached.wait(WAIT_S)
    with pytest.raises(ServingError, match="has not taken a step"):
        engine.check_health(stall_s=0)


def test_closing_cancels_what_is_in_flight(pipeline) -> None:
    engine = Engine(StepBatch(StableDiffusionDenoiser(pipeline), 2, (64, 64)), max_in_flight=4)
    (endless,) = engine.submit([request(steps=1000)])
    engine.close()
    with pytest.raises(CancelledError):
        endless.result(WAIT_S)
    with pytest.raises(ServingError, match="closed"):
        engine.submit([request()])
    with pytest.raises(ServingError, match="dead"):
        engine.check_health(stall_s=WAIT_S)
