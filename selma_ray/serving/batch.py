"""Batching at the level of denoising steps: requests join and leave a running batch between steps.

Every image size has a lane of its own, with a line of waiting requests (first come, first served) and a bounded number
of running ones. The lanes take turns, a step each, so that no size waits behind another. Requests for the merged model and
for mixes of experts have different weights and therefore different lanes; all mixes share one.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from selma_ray.models.course import Course
from selma_ray.serving.denoiser import Denoiser, RequestRows, Row
from selma_ray.serving.requests import MERGED, ImageRequest

__all__ = ["Outcome", "StepBatch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a request ended: with an image, or with an error; or, where `preview` counts it, an unfinished image of it."""

    ticket: int
    image: Image.Image | None = None
    error: Exception | None = None
    preview: int | None = None


@dataclass
class _Running:
    ticket: int
    request: ImageRequest
    rows: RequestRows
    course: Course

    @property
    def preview_due(self) -> int | None:
        """Return the number, from 0, of the preview that belongs after the step just taken; none after the last step."""
        done, total, count = self.course.steps_done, self.course.steps_in_all, self.request.num_previews
        if done >= total or done * (count + 1) // total == (done - 1) * (count + 1) // total:
            return None
        return done * (count + 1) // total - 1


@dataclass
class _Lane:
    denoiser: Denoiser
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
    their area, so that every lane's step fits the same memory. `merged` draws requests for the merged model, `mixing`
    those that mix experts on the base. Not thread-safe: one thread owns it.
    """

    def __init__(
        self, merged: Denoiser, max_batch_size: int, full_size_px: tuple[int, int], mixing: Denoiser | None = None
    ) -> None:
        self._merged = merged
        self._mixing = mixing
        self._max_batch_size = max_batch_size
        self._full_area = full_size_px[0] * full_size_px[1]
        self._lanes: OrderedDict[tuple[tuple[int, int], int], _Lane] = OrderedDict()
        self._next_ticket = 0
        self.num_moved = 0  # images that took part in the last step

    def __len__(self) -> int:
        return sum(len(lane.waiting) + len(lane.running) for lane in self._lanes.values())

    def submit(self, request: ImageRequest) -> int:
        """Put a request at the end of its lane's line; returns the ticket its outcome will carry."""
        denoiser = self._merged if request.mix is MERGED else self._mixing
        assert denoiser is not None, "a mix was asked of a batch without experts"
        lane = self._lanes.setdefault((request.size_px, id(denoiser)), _Lane(denoiser, self.slots(request.size_px)))
        ticket = self._next_ticket
        self._next_ticket += 1
        lane.waiting.append((ticket, request))
        return ticket

    def replace_merged(self, merged: Denoiser) -> None:
        """Draw requests that come from now on with other merged weights; those in the lanes keep the ones they have."""
        self._merged = merged

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for a slot."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

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
        return outcomes + self._move(lane) + self._previews(lane) + self._leave(lane)

    def _next_lane(self) -> _Lane | None:
        """Return the lane that has waited longest since its last turn; lanes without work are dropped."""
        while self._lanes:
            key, lane = next(iter(self._lanes.items()))
            if lane.waiting or lane.running:
                self._lanes.move_to_end(key)
                return lane
            del self._lanes[key]
        return None

    def _admit(self, lane: _Lane) -> list[Outcome]:
        admitted = lane.pop_admitted()
        if not admitted:
            return []
        try:
            lane.running += _started(lane.denoiser, admitted)
        except Exception:
            # One of them cannot be started: alone, each of the others can.
            return [outcome for entry in admitted for outcome in self._admit_alone(lane, entry)]
        return []

    def _admit_alone(self, lane: _Lane, entry: tuple[int, ImageRequest]) -> list[Outcome]:
        try:
            lane.running += _started(lane.denoiser, [entry])
        except Exception as error:
            logger.warning("a request cannot be started: %s", error)
            return [Outcome(entry[0], error=error)]
        return []

    def _move(self, lane: _Lane) -> list[Outcome]:
        """Move every request of a lane by one step; where that fails, all of them end."""
        if not lane.running:
            return []
        try:
            _take_step(lane.denoiser, lane.running)
        except Exception as error:
            logger.exception("a denoising step of %d images failed", len(lane.running))
            failed, lane.running = lane.running, []
            return [Outcome(running.ticket, error=error) for running in failed]
        return []

    def _previews(self, lane: _Lane) -> list[Outcome]:
        """Decode what the images that are due for a preview seem to become; a preview that fails is left out."""
        due = [(running, preview) for running in lane.running if (preview := running.preview_due) is not None]
        if not due:
            return []
        try:
            images = lane.denoiser.decode(torch.cat([running.course.estimate_NCHW for running, _ in due]))
        except Exception as error:
            logger.warning("previews of %d images failed: %s", len(due), error)
            return []
        return [
            Outcome(running.ticket, image, preview=preview)
            for (running, preview), image in zip(due, images, strict=True)
        ]

    def _leave(self, lane: _Lane) -> list[Outcome]:
        """Decode the requests of a lane that have taken their last step; the others stay."""
        finished = [running for running in lane.running if running.course.finished]
        if not finished:
            return []
        lane.running = [running for running in lane.running if not running.course.finished]
        try:
            images = lane.denoiser.decode(torch.cat([running.course.latents_NCHW for running in finished]))
        except Exception as error:
            logger.exception("decoding %d images failed", len(finished))
            return [Outcome(running.ticket, error=error) for running in finished]
        return [Outcome(running.ticket, image) for running, image in zip(finished, images, strict=True)]


def _started(denoiser: Denoiser, entries: Sequence[tuple[int, ImageRequest]]) -> list[_Running]:
    encoded = denoiser.encode([request for _, request in entries])
    return [
        _Running(ticket, request, rows, denoiser.start(request))
        for (ticket, request), rows in zip(entries, encoded, strict=True)
    ]


def _take_step(denoiser: Denoiser, moving: Sequence[_Running]) -> None:
    """Predict for all rows in one call: one for every request, and a second, unconditional one for the guided."""
    guided = [running for running in moving if running.rows.negative is not None]
    rows: list[Row] = [running.rows.positive for running in moving]
    rows += [running.rows.negative for running in guided if running.rows.negative is not None]
    inputs = {running.ticket: running.course.model_input() for running in moving}
    inputs_NCHW = torch.cat([inputs[running.ticket] for running in (*moving, *guided)])
    timesteps_N = torch.stack([running.course.timestep for running in (*moving, *guided)])
    predicted = denoiser.predict(inputs_NCHW, timesteps_N, rows).split(1)
    unconditional = {running.ticket: row for running, row in zip(guided, predicted[len(moving) :], strict=True)}
    for running, predicted_NCHW in zip(moving, predicted[: len(moving)], strict=True):
        followed_NCHW = denoiser.guide(running.request, predicted_NCHW, unconditional.get(running.ticket))
        running.course.advance(followed_NCHW)
