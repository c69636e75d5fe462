"""The thread that drives a StepBatch: requests come in from any thread, images leave through futures."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from PIL import Image

from selma_ray.errors import ServingError
from selma_ray.serving.batch import Outcome, StepBatch
from selma_ray.serving.denoiser import Denoiser
from selma_ray.serving.errors import queue_full, unavailable
from selma_ray.serving.requests import ImageRequest

__all__ = ["Engine", "EngineStats", "OnPreview"]

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2

OnPreview = Callable[[int, int, Image.Image], None]
"""Called on the engine's thread with the request's index in its call, the preview's number from 0, and the image."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done and holds."""

    in_flight: int
    """Images accepted and not answered."""
    waiting: int
    """Of these, images that have not taken their first step."""
    steps: int
    """Denoising steps taken, each of a whole batch."""
    image_steps: int
    """Denoising steps taken, counted for each image."""
    images: int
    """Images finished."""
    busy_s: float
    """Seconds spent in steps, decoding included."""
    occupancy: Mapping[int, int]
    """How many steps were taken by how many images."""


@dataclass(frozen=True)
class _Promise:
    """A future image and whom to show previews of it."""

    future: Future[Image.Image]
    index: int
    on_preview: OnPreview | None


class Engine:
    """Accepts up to `max_in_flight` images at a time and draws them on a thread of its own."""

    def __init__(self, batch: StepBatch, max_in_flight: int) -> None:
        self._batch = batch
        self._max_in_flight = max_in_flight
        self._changed = threading.Condition()
        self._inbox: deque[tuple[ImageRequest, _Promise]] = deque()
        self._promises: dict[int, _Promise] = {}
        self._new_merged: Denoiser | None = None
        self._closed = False
        self._moved_at_s = time.monotonic()
        self._occupancy: Counter[int] = Counter()
        self._images = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[ImageRequest], on_preview: OnPreview | None = None
    ) -> list[Future[Image.Image]]:
        """Accept all of `requests` or none; cancelling a future frees its slot at the next step.

        Raises RequestError: 429 where they do not fit, 503 where the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise unavailable("generator")
            if self._in_flight() + len(requests) > self._max_in_flight:
                raise queue_full(_RETRY_AFTER_S)
            promises = [_Promise(Future(), index, on_preview) for index in range(len(requests))]
            if not self._in_flight():
                self._moved_at_s = time.monotonic()
            self._inbox.extend(zip(requests, promises, strict=True))
            self._changed.notify()
        return [promise.future for promise in promises]

    def replace_merged(self, merged: Denoiser) -> None:
        """Draw requests that come from now on with other merged weights; those in flight finish on the ones they have."""
        with self._changed:
            self._new_merged = merged
            self._changed.notify()

    def stats(self) -> EngineStats:
        """Return counts since the start."""
        with self._changed:
            return EngineStats(
                in_flight=self._in_flight(),
                waiting=len(self._inbox) + self._batch.num_waiting,
                steps=self._occupancy.total(),
                image_steps=sum(size * count for size, count in self._occupancy.items()),
                images=self._images,
                busy_s=self._busy_s,
                occupancy=dict(self._occupancy),
            )

    def check_health(self, stall_s: float) -> None:
        """Raise ServingError where the thread is dead, or has work and has not taken a step for `stall_s` seconds."""
        if not self._thread.is_alive():
            raise ServingError("the engine's thread is dead; its process must be replaced")
        with self._changed:
            stalled = self._in_flight() > 0 and time.monotonic() - self._moved_at_s > stall_s
        if stalled:
            raise ServingError(f"the engine has not taken a step for {stall_s:g} s; its process must be replaced")

    def close(self) -> None:
        """Stop after the step in progress; what was accepted and not finished is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _in_flight(self) -> int:
        return len(self._inbox) + len(self._promises)

    def _run(self) -> None:
        try:
            while self._take_in():
                started_s = time.monotonic()
                outcomes = self._batch.step()
                self._hand_out(outcomes, time.monotonic() - started_s)
        finally:
            with self._changed:
                self._closed = True
                for promise in (*(promise for _, promise in self._inbox), *self._promises.values()):
                    promise.future.cancel()

    def _take_in(self) -> bool:
        """Wait for work, pass new requests to the batch, drop cancelled ones; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._inbox or self._promises or self._new_merged)
            if self._new_merged is not None:
                self._batch.replace_merged(self._new_merged)
                self._new_merged = None
            while self._inbox:
                request, promise = self._inbox.popleft()
                self._promises[self._batch.submit(request)] = promise
            cancelled = [ticket for ticket, promise in self._promises.items() if promise.future.cancelled()]
            for ticket in cancelled:
                del self._promises[ticket]
            self._batch.cancel(cancelled)
            return not self._closed

    def _hand_out(self, outcomes: Sequence[Outcome], step_s: float) -> None:
        ended = [outcome for outcome in outcomes if outcome.preview is None]
        with self._changed:
            if self._batch.num_moved:
                self._occupancy[self._batch.num_moved] += 1
            self._busy_s += step_s
            self._moved_at_s = time.monotonic()
            self._images += sum(outcome.image is not None for outcome in ended)
            shown = [(self._promises[outcome.ticket], outcome) for outcome in outcomes if outcome.preview is not None]
            kept = [(self._promises.pop(outcome.ticket), outcome) for outcome in ended]
        for promise, outcome in shown:
            _show(promise, outcome)
        for promise, outcome in kept:
            _keep(promise.future, outcome)


def _show(promise: _Promise, outcome: Outcome) -> None:
    if promise.on_preview is None or outcome.image is None or outcome.preview is None or promise.future.cancelled():
        return
    try:
        promise.on_preview(promise.index, outcome.preview, outcome.image)
    except Exception:
        # A caller that is gone must not stop the engine for all others.
        logger.warning("a preview found nobody to take it", exc_info=True)


def _keep(future: Future[Image.Image], outcome: Outcome) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if outcome.image is not None:
        future.set_result(outcome.image)
    else:
        future.set_exception(outcome.error)
