"""The thread that drives a StepBatch, and the one that decodes: requests come in from any thread, images leave through futures."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from PIL import Image

from selma_ray.adapters.mixing import Expert
from selma_ray.errors import ServingError, named_line
from selma_ray.serving.batch import Failure, LaneKey, StepBatch
from selma_ray.serving.decoding import CheckImages, Decoder, DecodingThread, Latents
from selma_ray.serving.denoiser import Denoiser
from selma_ray.serving.errors import queue_full, queue_too_long, too_slow_to_draw, unavailable
from selma_ray.serving.requests import ImageRequest

__all__ = ["Engine", "EngineStats", "OnPreview"]

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2  # before anything was measured

OnPreview = Callable[[int, int, Image.Image], None]
"""Called on the decoding thread with the request's index in its call, the preview's number from 0, and the image."""


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
    """Seconds spent in steps; decoding goes on beside them."""
    row_step_s: float
    """Seconds of a step of one row of the size that was drawn last, as its share of the batches it was in."""
    occupancy: Mapping[int, int]
    """How many steps were taken by how many images."""


@dataclass(frozen=True)
class _Promise:
    """A future image and whom to show previews of it."""

    future: Future[Image.Image]
    index: int
    on_preview: OnPreview | None


class Engine:
    """Accepts up to `max_in_flight` images at a time and draws them on threads of its own.

    With `timeout_s`, a call is refused at once whose images, by the measured seconds of a step of their size and of all that is
    before them, would come later. `check` decides whether an image may be shown.
    """

    def __init__(
        self, batch: StepBatch, max_in_flight: int, timeout_s: float | None = None, check: CheckImages | None = None
    ) -> None:
        self._batch = batch
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._inbox: deque[tuple[ImageRequest, _Promise]] = deque()
        self._promises: dict[int, _Promise] = {}
        self._backlog_s: dict[LaneKey, float] = {}
        self._changes: deque[tuple[int, Callable[[StepBatch], None]]] = deque()
        self._closed = False
        self._moved_at_s = time.monotonic()
        self._occupancy: Counter[int] = Counter()
        self._images = 0
        self._busy_s = 0.0
        self._decoding = DecodingThread(Decoder(check, batch.pace), self._deliver)
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[ImageRequest], on_preview: OnPreview | None = None
    ) -> list[Future[Image.Image]]:
        """Accept all of `requests` or none; cancelling a future frees its slot at the next step.

        Raises RequestError: 429 where they do not fit or would come too late, 400 where they would even if nothing were before
        them, 503 where the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise unavailable("generator")
            if self._in_flight() + len(requests) > self._max_in_flight:
                raise queue_full(self._room_in_s(len(requests)))
            self._refuse_what_comes_late(requests)
            promises = [_Promise(Future(), index, on_preview) for index in range(len(requests))]
            if not self._in_flight():
                self._moved_at_s = time.monotonic()
            self._inbox.extend(zip(requests, promises, strict=True))
            self._changed.notify()
        return [promise.future for promise in promises]

    def replace_merged(self, merged: Denoiser) -> None:
        """Draw requests that come from now on with other merged weights; those in flight finish on the ones they have."""
        self._change(lambda batch: batch.replace_merged(merged))

    def add_experts(self, experts: Mapping[str, Expert]) -> None:
        """Let requests that come from now on mix more experts, which fit the base model."""
        self._change(lambda batch: batch.add_experts(experts))

    def remove_experts(self, names: Iterable[str]) -> None:
        """Forget experts; requests in progress that mix one go on with it, and it leaves when the last of them has."""
        gone = tuple(names)
        if gone:
            self._change(lambda batch: batch.remove_experts(gone))

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
                row_step_s=self._batch.pace.row_step_s(),
                occupancy=dict(self._occupancy),
            )

    def check_health(self, stall_s: float) -> None:
        """Raise ServingError where the thread is dead, or has work and has not taken a step for `stall_s` seconds."""
        if not (self._thread.is_alive() and self._decoding.is_alive()):
            raise ServingError("a thread of the engine is dead; its process must be replaced")
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

    def _change(self, change: Callable[[StepBatch], None]) -> None:
        """Let the denoising thread change its batch before the next step."""
        with self._changed:
            self._changes.append((len(self._inbox), change))
            self._changed.notify()

    def _in_flight(self) -> int:
        return len(self._inbox) + len(self._promises)

    def _room_in_s(self, images: int) -> int:
        """Return the seconds after which so many images more may fit, by the work that is left."""
        left_s = sum(self._backlog_s.values())
        return math.ceil(left_s * images / max(images, self._in_flight())) or _RETRY_AFTER_S

    def _refuse_what_comes_late(self, requests: Sequence[ImageRequest]) -> None:
        """Raise RequestError for a call that could not be answered in time; add it to the lanes' work where it can."""
        own_s: dict[LaneKey, float] = {}
        decoding_s = sum(self._batch.pace.decoding_s(request.size_px) for request in requests)
        for request in requests:
            lane = self._batch.lane_of(request)
            own_s[lane] = own_s.get(lane, 0.0) + self._batch.steps_s(request, request.steps_to_take)
        alone_s = sum(own_s.values()) + decoding_s
        together_s = self._backlog_s | {lane: self._backlog_s.get(lane, 0.0) + own for lane, own in own_s.items()}
        if self._timeout_s is not None:
            if alone_s > self._timeout_s:
                raise too_slow_to_draw(alone_s, self._timeout_s)
            finished_s = decoding_s + max((self._finished_s(lane, together_s) for lane in own_s), default=0.0)
            if finished_s > self._timeout_s:
                raise queue_too_long(finished_s, self._timeout_s)
        self._backlog_s = together_s

    def _finished_s(self, lane: LaneKey, work_s: Mapping[LaneKey, float]) -> float:
        """Return when a lane is done with its work: until then the others have their shares, by weight, or all that they need."""
        share_s = work_s[lane] / self._batch.weight(lane[0])
        return sum(min(other_s, share_s * self._batch.weight(other[0])) for other, other_s in work_s.items())

    def _run(self) -> None:
        try:
            while self._take_in():
                started_s = time.monotonic()
                outcomes = self._batch.step()
                self._hand_out(outcomes, time.monotonic() - started_s)
        finally:
            self._decoding.close()
            with self._changed:
                self._closed = True
                for promise in (*(promise for _, promise in self._inbox), *self._promises.values()):
                    promise.future.cancel()

    def _take_in(self) -> bool:
        """Wait for work, pass new requests to the batch, drop cancelled ones; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._inbox or len(self._batch) or self._changes)
            self._take_in_order()
            cancelled = [ticket for ticket, promise in self._promises.items() if promise.future.cancelled()]
            for ticket in cancelled:
                del self._promises[ticket]
            self._batch.cancel(cancelled)
            self._decoding.drop(cancelled)
            self._backlog_s = self._batch.backlog_s()
            return not self._closed

    def _take_in_order(self) -> None:
        """Pass requests and changes to the batch in the order in which they came: what came before a change is drawn without it."""
        taken = 0
        while self._changes:
            after, change = self._changes.popleft()
            self._submit(after - taken)
            taken = after
            change(self._batch)
        self._submit(len(self._inbox))

    def _submit(self, count: int) -> None:
        for _ in range(count):
            request, promise = self._inbox.popleft()
            self._promises[self._batch.submit(request)] = promise

    def _hand_out(self, outcomes: Sequence[Latents | Failure], step_s: float) -> None:
        self._decoding.put(outcome for outcome in outcomes if isinstance(outcome, Latents))
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        with self._changed:
            if self._batch.num_moved:
                self._occupancy[self._batch.num_moved] += 1
            self._busy_s += step_s
            self._moved_at_s = time.monotonic()
            failed = [(self._promises.pop(failure.ticket), failure.error) for failure in failures]
            if not self._inbox:  # else this call's work would be forgotten until it is in the batch
                self._backlog_s = self._batch.backlog_s()
        for promise, error in failed:
            _keep(promise.future, error)

    def _deliver(self, latents: Latents, image: Image.Image | Exception) -> None:
        """Pass on what was decoded; called on the decoding thread."""
        with self._changed:
            self._moved_at_s = time.monotonic()
            promise = self._promises.get(latents.ticket)
            if promise is None:
                return
            if latents.preview is None:
                del self._promises[latents.ticket]
                self._images += isinstance(image, Image.Image)
        if latents.preview is None:
            _keep(promise.future, image)
        elif isinstance(image, Image.Image):
            _show(promise, latents.preview, image)
        else:
            logger.warning("a preview failed: %s", named_line(image))


def _show(promise: _Promise, preview: int, image: Image.Image) -> None:
    if promise.on_preview is None or promise.future.cancelled():
        return
    try:
        promise.on_preview(promise.index, preview, image)
    except Exception:
        # A caller that is gone must not stop the engine for all others.
        logger.warning("a preview callback failed", exc_info=True)


def _keep(future: Future[Image.Image], image: Image.Image | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(image, Image.Image):
        future.set_result(image)
    else:
        future.set_exception(image)
