"""Batching at the level of denoising steps: requests join and leave a running batch between steps.

Every image size has a lane of its own, with a line of waiting requests (first come, first served) and a bounded number
of running ones. The lanes take turns, a step each, so that no size waits behind another.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from selma_ray.serving.denoisers import Conditions, Denoiser
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.schedulers import Course

__all__ = ["Outcome", "StepBatch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a request ended: with an image, or with an error."""

    ticket: int
    image: Image.Image | None = None
    error: Exception | None = None


@dataclass
class _Running:
    ticket: int
    request: ImageRequest
    conditions: Conditions
    course: Course

    def advance(self, predicted_NCHW: torch.Tensor, unconditional_NCHW: torch.Tensor | None) -> None:
        """Take one step, with classifier-free guidance where the request asks for it (Ho & Salimans, equation 6)."""
        if unconditional_NCHW is not None:
            predicted_NCHW = unconditional_NCHW + self.request.guidance_scale * (predicted_NCHW - unconditional_NCHW)
        self.course.advance(predicted_NCHW)


@dataclass
class _Lane:
    slots: int
    waiting: deque[tuple[int, ImageRequest]] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)

    def drop(self, tickets: set[int]) -> None:
        self.waiting = deque(entry for entry in self.waiting if entry[0] not in tickets)
        self.running = [running for running in self.running if running.ticket not in tickets]

    def pop_admitted(self) -> list[tuple[int, ImageRequest]]:
        return [self.waiting.popleft() for _ in range(min(self.slots - len(self.running), len(self.waiting)))]


class StepBatch:
    """Requests in progress on one model; `step` moves one lane by one denoising step.

    `max_batch_size` images of `full_size_px` (height, width) share a step; of larger images fewer, in proportion to
    their area, so that every lane's step fits the same memory. Not thread-safe: one thread owns it.
    """

    def __init__(self, denoiser: Denoiser, max_batch_size: int, full_size_px: tuple[int, int]) -> None:
        self._denoiser = denoiser
        self._max_batch_size = max_batch_size
        self._full_area = full_size_px[0] * full_size_px[1]
        self._lanes: OrderedDict[tuple[int, int], _Lane] = OrderedDict()
        self._next_ticket = 0
        self.num_moved = 0  # images that took part in the last step

    def __len__(self) -> int:
        return sum(len(lane.waiting) + len(lane.running) for lane in self._lanes.values())

    def submit(self, request: ImageRequest) -> int:
        """Put a request at the end of its size's line; returns the ticket its outcome will carry."""
        if request.size_px not in self._lanes:
            self._lanes[request.size_px] = _Lane(self.slots(request.size_px))
        ticket = self._next_ticket
        self._next_ticket += 1
        self._lanes[request.size_px].waiting.append((ticket, request))
        return ticket

    def cancel(self, tickets: Iterable[int]) -> None:
        """Forget requests, waiting or running; their slots are free at the next step and they have no outcome."""
        gone = set(tickets)
        for lane in self._lanes.values():
            lane.drop(gone)

    def slots(self, size_px: tuple[int, int]) -> int:
        """Return how many images of a size share a step."""
        return max(1, min(self._max_batch_size, self._max_batch_size * self._full_area // (size_px[0] * size_px[1])))

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """Admit waiting requests to the lane whose turn it is, move it by one step, return what ended."""
        lane = self._next_lane()
        if lane is None:
            self.num_moved = 0
            return []
        outcomes = self._admit(lane)
        self.num_moved = len(lane.running)
        return outcomes + self._move(lane) + self._leave(lane)

    def _next_lane(self) -> _Lane | None:
        """Return the lane that has waited longest since its last turn; lanes without work are dropped."""
        while self._lanes:
            size_px, lane = next(iter(self._lanes.items()))
            if lane.waiting or lane.running:
                self._lanes.move_to_end(size_px)
                return lane
            del self._lanes[size_px]
        return None

    def _admit(self, lane: _Lane) -> list[Outcome]:
        admitted = lane.pop_admitted()
        if not admitted:
            return []
        try:
            lane.running += self._started(admitted)
        except Exception:
            # One of them cannot be started: alone, each of the others can.
            return [outcome for entry in admitted for outcome in self._admit_alone(lane, entry)]
        return []

    def _admit_alone(self, lane: _Lane, entry: tuple[int, ImageRequest]) -> list[Outcome]:
        try:
            lane.running += self._started([entry])
        except Exception as error:
            logger.warning("a request cannot be started: %s", error)
            return [Outcome(entry[0], error=error)]
        return []

    def _started(self, entries: Sequence[tuple[int, ImageRequest]]) -> list[_Running]:
        conditions = self._denoiser.encode([request for _, request in entries])
        return [
            _Running(ticket, request, condition, self._denoiser.start(request))
            for (ticket, request), condition in zip(entries, conditions, strict=True)
        ]

    def _move(self, lane: _Lane) -> list[Outcome]:
        """Move every request of a lane by one step; where that fails, all of them end."""
        if not lane.running:
            return []
        try:
            self._step(lane.running)
        except Exception as error:
            logger.exception("a denoising step of %d images failed", len(lane.running))
            failed, lane.running = lane.running, []
            return [Outcome(running.ticket, error=error) for running in failed]
        return []

    def _step(self, moving: Sequence[_Running]) -> None:
        """Predict for all rows in one call: one for every request, and a second, unconditional one for the guided."""
        guided = [running for running in moving if running.conditions.negative is not None]
        conditions = [running.conditions.positive for running in moving]
        conditions += [running.conditions.negative for running in guided if running.conditions.negative is not None]
        inputs = {running.ticket: running.course.model_input() for running in moving}
        inputs_NCHW = torch.cat([inputs[running.ticket] for running in (*moving, *guided)])
        timesteps_N = torch.stack([running.course.timestep for running in (*moving, *guided)])
        predicted = self._denoiser.predict(inputs_NCHW, timesteps_N, conditions).split(1)
        unconditional = {running.ticket: row for running, row in zip(guided, predicted[len(moving) :], strict=True)}
        for running, predicted_NCHW in zip(moving, predicted[: len(moving)], strict=True):
            running.advance(predicted_NCHW, unconditional.get(running.ticket))

    def _leave(self, lane: _Lane) -> list[Outcome]:
        """Decode the requests of a lane that have taken their last step; the others stay."""
        finished = [running for running in lane.running if running.course.finished]
        if not finished:
            return []
        lane.running = [running for running in lane.running if not running.course.finished]
        try:
            images = self._denoiser.decode(torch.cat([running.course.latents_NCHW for running in finished]))
        except Exception as error:
            logger.exception("decoding %d images failed", len(finished))
            return [Outcome(running.ticket, error=error) for running in finished]
        return [Outcome(running.ticket, image) for running, image in zip(finished, images, strict=True)]
