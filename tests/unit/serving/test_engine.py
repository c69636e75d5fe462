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
from tests.unit.serving.solo import stepped

WAIT_S = 60


class GatedDenoiser(Denoiser):
    """Waits before every prediction until the gate is open; fails while told to."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(open_predictor(pipeline))
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.broken = False
        self.calls = 0
        self.shut_after = 0
        self.decoded: list[int] = []
        self.decoding = threading.Event()
        self.decoding.set()
        self.decoding_begun = threading.Event()
        self.decode_error: Exception | None = None
        self.most_decoded = 99

    def predict(self, *arguments: Any) -> Any:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        self.calls += 1
        if self.shut_after and self.calls % self.shut_after == 0 and self.calls < 8:
            self.gate.clear()
        if self.broken:
            raise RuntimeError("broken")
        return super().predict(*arguments)

    def decode(self, latents_NChw: torch.Tensor) -> Any:
        self.decoding_begun.set()
        assert self.decoding.wait(WAIT_S)
        self.decoded.append(len(latents_NChw))
        if self.decode_error:
            raise self.decode_error
        if len(latents_NChw) > self.most_decoded:
            raise torch.OutOfMemoryError("no")
        return super().decode(latents_NChw)


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

    def show(*preview: Any) -> None:
        shown.append(preview)
        denoiser.gate.set()

    previewed = replace(request(steps=8), num_previews=3)
    denoiser.shut_after = 2  # steps between previews, so that each is decoded before the next is there
    (future,) = engine.submit([previewed], on_preview=show)
    denoiser.gate.set()
    assert future.result(WAIT_S).size == (64, 64)
    assert [(index, preview) for index, preview, _ in shown] == [(0, 0), (0, 1), (0, 2)]
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
    (outcome,) = [outcome for _ in range(2) for outcome in stepped(alone)]
    assert old.tobytes() == outcome.image.tobytes() != new.tobytes()


def test_a_change_is_for_what_comes_after_it_though_all_is_taken_in_at_once(
    engine: Engine, denoiser: GatedDenoiser, pipeline: Any
) -> None:
    denoiser.gate.set()
    other = pipeline.from_pipe(pipeline, unet=deepcopy(pipeline.unet))
    with torch.no_grad():
        other.unet.conv_out.weight.zero_()
    (plain,) = engine.submit([request()])
    expected = plain.result(WAIT_S)
    with engine._changed:  # its thread waits for this
        (before,) = engine.submit([request()])
        engine.replace_merged(denoiser_for(other))
        (after,) = engine.submit([request()])
    assert before.result(WAIT_S).tobytes() == expected.tobytes()
    assert after.result(WAIT_S).tobytes() != expected.tobytes()


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


def test_decoding_never_holds_up_a_step_and_finished_images_go_before_previews(
    engine: Engine, denoiser: GatedDenoiser
) -> None:
    denoiser.decoding.clear()
    denoiser.gate.set()
    order: list[Any] = []
    previewed = replace(request(seed=1, steps=12), num_previews=4)
    short, long = engine.submit([request(), previewed], on_preview=lambda index, preview, _: order.append(preview))
    short.add_done_callback(lambda _: order.append("short"))
    long.add_done_callback(lambda _: order.append("long"))
    while engine.stats().image_steps < 14:  # all steps are taken while the first image waits to be decoded
        threading.Event().wait(0.01)
    assert not short.done()
    denoiser.decoding.set()
    assert long.result(WAIT_S).size == (64, 64)
    assert order[-1] == "long"
    assert order in (["short", "long"], [0, "short", "long"]), "of previews that are late none is shown"
    engine.check_health(stall_s=WAIT_S)


def test_a_failed_decoding_ends_its_images_and_no_others(engine: Engine, denoiser: GatedDenoiser) -> None:
    denoiser.gate.set()
    denoiser.decode_error = RuntimeError("undecodable")
    with pytest.raises(RuntimeError, match="undecodable"):
        engine.submit([request()])[0].result(WAIT_S)
    denoiser.decode_error = None
    assert engine.submit([request()])[0].result(WAIT_S).size == (64, 64)


def test_an_image_whose_decoding_does_not_fit_is_refused_by_its_size(engine: Engine, denoiser: GatedDenoiser) -> None:
    denoiser.gate.set()
    denoiser.most_decoded = 0
    with pytest.raises(RequestError, match="64x64 does not fit the memory") as refusal:
        engine.submit([request()])[0].result(WAIT_S)
    assert (refusal.value.status, refusal.value.code) == (500, "out_of_memory")


def test_what_nobody_waits_for_is_not_decoded(engine: Engine, denoiser: GatedDenoiser) -> None:
    denoiser.gate.set()
    denoiser.decoding.clear()
    first, left = engine.submit([request(), request(seed=1, steps=3)])
    assert denoiser.decoding_begun.wait(WAIT_S)
    while engine.stats().image_steps < 5:
        threading.Event().wait(0.01)
    left.cancel()
    later = engine.submit([request(seed=2, steps=900)])[0]  # the engine takes in what was cancelled
    while engine.stats().image_steps < 7:
        threading.Event().wait(0.01)
    denoiser.decoding.set()
    first.result(WAIT_S)
    later.cancel()
    while engine.stats().in_flight:
        threading.Event().wait(0.01)
    assert sum(denoiser.decoded) == 1


def engine_with_pace(denoiser: GatedDenoiser, row_step_s: float, timeout_s: float, size_weights: Any = None) -> Engine:
    batch = StepBatch(denoiser, 2, (64, 64), size_weights=size_weights)
    for _ in range(9):
        batch.pace.note_step((64, 64), 2, 2 * row_step_s)
    return Engine(batch, max_in_flight=20, timeout_s=timeout_s)


def test_what_would_come_too_late_is_refused_at_once_with_the_reason(denoiser: GatedDenoiser) -> None:
    engine = engine_with_pace(denoiser, row_step_s=0.5, timeout_s=60)  # 1 s a step of an image
    try:
        engine.submit([request(steps=40)])
        with pytest.raises(RequestError, match=r"about 70 s .* more than the 60 s allowed") as refusal:
            engine.submit([request(steps=30)])
        assert (refusal.value.status, refusal.value.code, refusal.value.retry_after_s) == (429, "queue_too_long", 10)
        with pytest.raises(RequestError, match=r"about 61 s to draw.*fewer steps") as refusal:
            engine.submit([request(steps=61)])
        assert (refusal.value.status, refusal.value.code) == (400, "too_slow_to_draw")
        engine.submit([request(steps=19)])
        with pytest.raises(RequestError):
            engine.submit([request(steps=2)])
        # Another size shares the time: it need not wait for all of the 59 s before it.
        engine.submit([ImageRequest("a red ball", 0, 20, 2.0, 32, 64)])
    finally:
        for promise in [*engine._promises.values(), *(promise for _, promise in engine._inbox)]:
            promise.future.cancel()
        denoiser.gate.set()
        engine.close()


def test_a_full_queue_says_when_there_is_room_by_what_was_measured(denoiser: GatedDenoiser) -> None:
    engine = engine_with_pace(denoiser, row_step_s=0.5, timeout_s=1000)
    try:
        futures = engine.submit([request(seed, steps=30) for seed in range(20)])
        with pytest.raises(RequestError, match="queue is full") as refusal:
            engine.submit([request()])
        assert refusal.value.retry_after_s == 30
        for future in futures:
            future.cancel()
    finally:
        denoiser.gate.set()
        engine.close()
