"""One expert's way through its rounds: an adapter is left to draw, its images are waited for, and what a checkpoint holds is given up.

Images are drawn elsewhere, by whoever follows the rounds' folders. Knows no Ray.
"""

import logging
import time
from collections.abc import Callable

from selma_ray.errors import TrainingError
from selma_ray.experts.figures import Curve
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.round_examples import RoundExamples
from selma_ray.experts.rounds import Round

__all__ = ["ExpertRounds"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2  # four trainers of five wait at any time: more often they took a sixth of a core
_REMOTE_POLL_S = 1.0
_TOLD_AFTER_S = 300.0  # then after twice as long, and so on


class ExpertRounds:
    """What a trainer asks of the rounds of one expert; the first worker alone writes."""

    def __init__(self, job: ExpertJob, *, writes: bool) -> None:
        assert job.rounds is not None
        assert job.config.nft is not None
        self.plan, self.nft = job.rounds, job.config.nft
        self.steps_per_round = self.nft.steps_per_round(job.config.batch_size)
        self.examples: RoundExamples | None = None
        self._job, self._writes = job, writes
        self._kept_by_checkpoint = 0

    def at(self, step: int) -> Round:
        """Return the round that a step, counted from 0, learns from."""
        return self.plan.of(step // self.steps_per_round + 1)

    def publish(self, round_: Round, write: Callable[[str], None]) -> None:
        """Have the adapter that draws a round written to its folder, unless it is there."""
        if self._writes and not round_.can_be_drawn():
            write(round_.adapter)

    def open(self, round_: Round) -> None:
        """Wait for the images of a round and open what they teach; raises TrainingError where none will come, or they teach nothing."""
        self.wait_for_images(round_)
        self.examples = RoundExamples(round_, self._job.name, self.nft.spread_deviations)
        if self._writes:
            round_.write_summary(self.examples.summary)

    def wait_for_images(self, round_: Round) -> None:
        """Return when all images of a round are there; raises TrainingError where they will not come."""
        interval_s = _POLL_S if self._job.folder.is_local else _REMOTE_POLL_S
        missing = round_.missing_chunks()
        started_s, told_after_s = time.monotonic(), _TOLD_AFTER_S
        while missing:
            reason = self.plan.stopped()
            if reason is not None:
                raise TrainingError(f"images of expert {self._job.name} could not be drawn: {reason}")
            if time.monotonic() - started_s >= told_after_s:
                logger.warning(
                    "expert %s has waited %.0f s for images of round %d: %d of %d chunks are still to be drawn",
                    self._job.name, told_after_s, round_.number, len(missing), self.plan.chunks_per_round,
                )  # fmt: skip
                told_after_s *= 2
            time.sleep(interval_s)
            missing = [chunk for chunk in missing if not round_.is_drawn(chunk)]

    def note(self, curve: Curve) -> None:
        """Add to a curve what the round's images are worth."""
        assert self.examples is not None
        summary = self.examples.summary
        curve.score.append(summary["score"])
        curve.equal_groups.append(summary["equal_groups"] / summary["groups"])

    def ends_round(self, steps_done: int) -> bool:
        """Tell whether the last step was a round's last."""
        return steps_done % self.steps_per_round == 0

    def saved(self, steps_done: int) -> None:
        """Take note of a checkpoint; the examples of rounds that the one before it holds are given up."""
        self._give_up(self._kept_by_checkpoint)
        self.restored(steps_done)

    def restored(self, steps_done: int) -> None:
        """Take note of the checkpoint that training goes on from."""
        self._kept_by_checkpoint = steps_done // self.steps_per_round

    def ended(self) -> None:
        """Give up all examples: the adapter is written."""
        self._give_up(self.nft.rounds)

    def _give_up(self, up_to: int) -> None:
        for number in range(up_to if self._writes else 0, 0, -1):
            if self.plan.of(number).is_learnt():
                return
            self.plan.of(number).give_up_examples()
