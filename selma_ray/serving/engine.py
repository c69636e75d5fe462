"""The thread that drives a StepBatch: requests come in from any thread, images leave through futures."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from PIL import Image

from selma_ray.errors import ServingError
from selma_ray.serving.batch import Outcome, StepBatch
from selma_ray.serving.errors import queue_full
from selma_ray.serving.requests import ImageRequest

__all__ = ["Engine", "EngineStats"]

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done and holds."""

    in_flight: int
    """Images accepted and not answered."""
    steps: int
    """Denoising steps taken, each of a whole batch."""
    image_steps: int
    """Denoising steps taken, counted for each image."""
    images: int
    """Images finished."""


class Engine:
    """Accepts up to `max_in_flight` images at a time and draws them on a thread of its own."""

    def __init__(self, batch: StepBatch, max_in_flight: int) -> None:
        self._batch = batch
        self._max_in_flight = max_in_flight
        self._changed = threading.Condition()
        self._inbox: deque[tuple[ImageRequest, Future[Image.Image]]] = deque()
        self._futures: dict[int, Future[Image.Image]] = {}
        self._closed = False
        self._moved_at_s = time.monotonic()
        self._steps = self._image_steps = self._images = 0
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[ImageRequest]) -> list[Future[Image.Image]]:
        """Accept all of `requests` or none; cancelling a future frees its slot at the next step.

        Raises RequestError (429) where they do not fit, ServingError where the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise ServingError("the engine is closed; start another")
            if self._in_flight() + len(requests) > self._max_in_flight:
                raise queue_full(_RETRY_AFTER_S)
            futures: list[Future[Image.Image]] = [Future() for _ in requests]
            if not self._in_flight():
                self._moved_at_s = time.monotonic()
            self._inbox.extend(zip(requests, futures, strict=True))
            self._changed.notify()
        return futures

    def stats(self) -> EngineStats:
        """Return counts since the start."""
        with self._changed:
            return EngineStats(self._in_flight(), self._steps, self._image_steps, self._images)

    def check_health(self, stall_s: float) -> None:
        """Raise ServingError where the thread is dead, or has work and has not taken a step for `stall_s` seconds."""
        if not self._thread.is_alive():
            raise ServingError("the engine's thread is dead; the replica must be replaced")
        with self._changed:
            stalled = self._in_flight() > 0 and time.monotonic() - self._moved_at_s > stall_s
        if stalled:
            raise ServingError(f"the engine has not taken a step for {stall_s:g} s; the replica must be replaced")

    def close(self) -> None:
        """Stop after the step in progress; what was accepted and not finished is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _in_flight(self) -> int:
        return len(self._inbox) + len(self._futures)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._hand_out(self._batch.step())
        finally:
            with self._changed:
                self._closed = True
                for _, future in self._inbox:
                    future.cancel()
                for future in self._futures.values():
                    future.cancel()

    def _take_in(self) -> bool:
        """Wait for work, pass new requests to the batch, drop cancelled ones; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._inbox or self._futures)
            while self._inbox:
                request, future = self._inbox.popleft()
                self._futures[self._batch.submit(request)] = future
            cancelled = [ticket for ticket, future in self._futures.items() if future.cancelled()]
            for ticket in cancelled:
                del self._futures[ticket]
            closed = self._closed
        if cancelled:
            self._batch.cancel(cancelled)
        return not closed

    def _hand_out(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self._steps += 1
            self._image_steps += self._batch.num_moved
            self._moved_at_s = time.monotonic()
            ended = [(self._futures.pop(outcome.ticket), outcome) for outcome in outcomes]
            self._images += sum(outcome.image is not None for outcome in outcomes)
        for future, outcome in ended:
            if not future.set_running_or_notify_cancel():
                continue
            if outcome.image is not None:
                future.set_result(outcome.image)
            else:
                future.set_exception(outcome.error)
