"""Batching at the level of denoising steps: requests join and leave a running batch between steps.

Every image size has a lane of its own, with a line of waiting requests (first come, first served) and a bounded number
of running ones. Lanes share the time, not the steps: the next step is that of the lane which has had the fewest seconds since it
got work, so that a small image is not held up by the slow steps of large ones. Requests for the merged model and for mixes of
experts have different weights and therefore different lanes; all mixes share one.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from selma_ray.adapters.mixing import Expert
from selma_ray.models.batches import HalvingBatches, is_out_of_memory
from selma_ray.models.course import Course
from selma_ray.serving.decoding import Latents
from selma_ray.serving.denoiser import Denoiser, RequestRows, Row
from selma_ray.serving.errors import too_large_for_memory
from selma_ray.serving.pace import Pace
from selma_ray.serving.requests import MERGED, ImageRequest
from selma_ray.serving.timing import StepTimer

__all__ = ["Failure", "LaneKey", "StepBatch"]

logger = logging.getLogger(__name__)

LaneKey = tuple[tuple[int, int], int]
"""Which requests share a lane: their size, and the denoiser."""


@dataclass(frozen=True)
class Failure:
    """A request that ended without an image."""

    ticket: int
    error: Exception


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
    size_px: tuple[int, int]
    slots: int
    rows: HalvingBatches
    had_s: float
    """Seconds that the lane has had, in the count that all lanes share."""
    weight: float
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
    their area, so that every lane's step fits the same memory; where it does not, its rows are predicted in smaller parts.
    `merged` draws requests for the merged model, `mixing` those that mix experts on the base. A size has `size_weights` times the
    share of the time that others have, by default the same. Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        merged: Denoiser,
        max_batch_size: int,
        full_size_px: tuple[int, int],
        mixing: Denoiser | None = None,
        size_weights: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        self._merged = merged
        self._mixing = mixing
        self._max_batch_size = max_batch_size
        self._full_area = full_size_px[0] * full_size_px[1]
        self._size_weights = size_weights or {}
        self._lanes: dict[LaneKey, _Lane] = {}
        self._rows: dict[tuple[int, int], HalvingBatches] = {}
        self._had_s = 0.0  # of the lane whose turn it was last, at its beginning
        self._timer = StepTimer(merged.device)
        self._next_ticket = 0
        self._leaving: set[str] = set()
        self.pace = Pace()
        self.num_moved = 0  # images that took part in the last step

    def __len__(self) -> int:
        return sum(len(lane.waiting) + len(lane.running) for lane in self._lanes.values())

    def submit(self, request: ImageRequest) -> int:
        """Put a request at the end of its lane's line; returns the ticket that its latents or its failure will carry."""
        lane = self._lane(request)
        ticket = self._next_ticket
        self._next_ticket += 1
        lane.waiting.append((ticket, request))
        return ticket

    def lane_of(self, request: ImageRequest) -> LaneKey:
        """Return in which lane a request would be put."""
        return request.size_px, id(self._denoiser_for(request))

    def weight(self, size_px: tuple[int, int]) -> float:
        """Return the share of the time that a lane of a size has, relative to the others'."""
        return self._size_weights.get(size_px, 1.0)

    def steps_s(self, request: ImageRequest, steps: int) -> float:
        """Return the seconds of some steps of a request, as far as steps were measured."""
        return self.pace.steps_s(request.size_px, steps * self._denoiser_for(request).rows_of(request))

    def backlog_s(self) -> dict[LaneKey, float]:
        """Return the seconds of work left in each lane, as far as steps were measured."""
        return {
            key: sum(
                [self.steps_s(each.request, each.course.steps_in_all - each.course.steps_done) for each in lane.running]
                + [self.steps_s(request, request.steps_to_take) for _, request in lane.waiting]
            )
            for key, lane in self._lanes.items()
        }

    def replace_merged(self, merged: Denoiser) -> None:
        """Draw requests that come from now on with other merged weights; those in the lanes keep the ones they have."""
        self._merged = merged

    def add_experts(self, experts: Mapping[str, Expert]) -> None:
        """Let mixes have more experts, which fit the base model."""
        if self._mixing is not None:
            self._leaving -= experts.keys()
            self._mixing.add_experts(experts)

    def remove_experts(self, names: Iterable[str]) -> None:
        """Forget experts: each once no request that mixes it waits or runs."""
        self._leaving |= set(names)
        self._drop_experts()

    def _drop_experts(self) -> None:
        if not self._leaving or self._mixing is None:
            return
        requests = [
            request
            for lane in self._lanes.values()
            for request in (*(each.request for each in lane.running), *(request for _, request in lane.waiting))
        ]
        unused = self._leaving - {name for request in requests for name, _ in request.mix or ()}
        self._mixing.remove_experts(unused)
        self._leaving -= unused

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for a slot."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def cancel(self, tickets: Iterable[int]) -> None:
        """Forget requests, waiting or running; their slots are free at the next step and nothing comes of them."""
        gone = set(tickets)
        for lane in self._lanes.values():
            lane.drop(gone)

    def slots(self, size_px: tuple[int, int]) -> int:
        """Return how many images of a size share a step."""
        return max(1, min(self._max_batch_size, self._max_batch_size * self._full_area // (size_px[0] * size_px[1])))

    @torch.inference_mode()
    def step(self) -> list[Latents | Failure]:
        """Admit waiting requests to the lane whose turn it is, move it by one step, return what is to be decoded and what failed."""
        lane = self._next_lane()
        self._drop_experts()
        if lane is None:
            self.num_moved = 0
            return []
        failures = self._admit(lane)
        self.num_moved = len(lane.running)
        return [*failures, *self._move(lane), *self._previews(lane), *self._leave(lane)]

    def _denoiser_for(self, request: ImageRequest) -> Denoiser:
        denoiser = self._merged if request.mix is MERGED else self._mixing
        assert denoiser is not None, "a mix was asked of a batch without experts"
        return denoiser

    def _lane(self, request: ImageRequest) -> _Lane:
        """Return the lane of a request; one that had no work starts level with the others, whatever it had before."""
        key, size_px = self.lane_of(request), request.size_px
        if key not in self._lanes:
            rows = self._rows.setdefault(size_px, HalvingBatches())
            self._lanes[key] = _Lane(
                self._denoiser_for(request), size_px, self.slots(size_px), rows, self._had_s, self.weight(size_px)
            )
        return self._lanes[key]

    def _next_lane(self) -> _Lane | None:
        """Return the lane that has had the fewest seconds; lanes without work are dropped."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane.waiting or lane.running}
        if not self._lanes:
            return None
        lane = min(self._lanes.values(), key=lambda lane: lane.had_s)
        self._had_s = max(self._had_s, lane.had_s)
        return lane

    def _admit(self, lane: _Lane) -> list[Failure]:
        admitted = lane.pop_admitted()
        if not admitted:
            return []
        started_s = time.perf_counter()
        try:
            lane.running += _started(lane.denoiser, admitted)
            return []
        except Exception:
            # One of them cannot be started: alone, each of the others can.
            return [failure for entry in admitted for failure in self._admit_alone(lane, entry)]
        finally:
            lane.had_s += (time.perf_counter() - started_s) / lane.weight  # encoding an image takes as long as steps do

    def _admit_alone(self, lane: _Lane, entry: tuple[int, ImageRequest]) -> list[Failure]:
        try:
            lane.running += _started(lane.denoiser, [entry])
        except Exception as error:
            logger.warning("a request cannot be started: %s", error)
            return [Failure(entry[0], error)]
        return []

    def _move(self, lane: _Lane) -> list[Failure]:
        """Move every request of a lane by one step; where that fails, all of them end."""
        if not lane.running:
            return []
        rows = sum(1 if running.rows.negative is None else 2 for running in lane.running)
        try:
            with self._timer.timing(lambda seconds: self._note(lane, rows, seconds)):
                _take_step(lane.denoiser, lane.running, lane.rows)
        except Exception as error:
            logger.exception("a denoising step of %d images failed", len(lane.running))
            failed, lane.running = lane.running, []
            reason = too_large_for_memory(lane.size_px) if is_out_of_memory(error) else error
            return [Failure(running.ticket, reason) for running in failed]
        return []

    def _note(self, lane: _Lane, rows: int, seconds: float) -> None:
        lane.had_s += seconds / lane.weight
        self.pace.note_step(lane.size_px, rows, seconds)

    def _previews(self, lane: _Lane) -> list[Latents]:
        """Return what the images that are due for a preview seem to become."""
        return [
            Latents(running.ticket, running.request, running.course.estimate_NCHW, lane.denoiser, preview)
            for running in lane.running
            if (preview := running.preview_due) is not None
        ]

    def _leave(self, lane: _Lane) -> list[Latents]:
        """Hand out the requests of a lane that have taken their last step; the others stay."""
        finished = [running for running in lane.running if running.course.finished]
        lane.running = [running for running in lane.running if not running.course.finished]
        return [
            Latents(running.ticket, running.request, running.course.latents_NCHW, lane.denoiser) for running in finished
        ]


def _started(denoiser: Denoiser, entries: Sequence[tuple[int, ImageRequest]]) -> list[_Running]:
    encoded = denoiser.encode([request for _, request in entries])
    return [
        _Running(ticket, request, rows, denoiser.start(request))
        for (ticket, request), rows in zip(entries, encoded, strict=True)
    ]


def _take_step(denoiser: Denoiser, moving: Sequence[_Running], batches: HalvingBatches) -> None:
    """Predict for all rows together: one for every request, and a second, unconditional one for the guided."""
    guided = [running for running in moving if running.rows.negative is not None]
    rows: list[Row] = [running.rows.positive for running in moving]
    rows += [running.rows.negative for running in guided if running.rows.negative is not None]
    inputs = {running.ticket: running.course.model_input() for running in moving}
    inputs_NCHW = torch.cat([inputs[running.ticket] for running in (*moving, *guided)])
    timesteps_N = torch.stack([running.course.timestep for running in (*moving, *guided)])

    def predict(chosen: Sequence[int]) -> Sequence[torch.Tensor]:
        part = slice(chosen[0], chosen[-1] + 1)
        return denoiser.predict(inputs_NCHW[part], timesteps_N[part], rows[part]).split(1)

    predicted = batches.map(predict, range(len(rows)))
    unconditional = {running.ticket: row for running, row in zip(guided, predicted[len(moving) :], strict=True)}
    for running, predicted_NCHW in zip(moving, predicted[: len(moving)], strict=True):
        followed_NCHW = denoiser.guide(running.request, predicted_NCHW, unconditional.get(running.ticket))
        running.course.advance(followed_NCHW)
