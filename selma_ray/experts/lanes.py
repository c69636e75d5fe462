"""Lanes: the experts that one Ray Train run fits one after another, so that its processes start once and not for each.

Where the cluster holds all experts at once, each has a lane of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from selma_ray.experts.job import ExpertJob
from selma_ray.experts.selection import is_fitted
from selma_ray.records import content_id

__all__ = ["Lane", "divide"]


@dataclass(frozen=True)
class Lane:
    """Experts that are fitted one after another, at least one. Pickles, for the workers."""

    jobs: tuple[ExpertJob, ...]

    @property
    def directory(self) -> str:
        """Return the folder that holds the lane's checkpoints, relative to the run's: its first expert's."""
        return self.jobs[0].directory

    @property
    def checkpoints(self) -> str:
        """Return the name of the folder of checkpoints inside `directory`; another lane's are never restored."""
        return f"checkpoints-{content_id(experts=[job.key for job in self.jobs])[:12]}"

    def unfitted(self) -> tuple[ExpertJob, ...]:
        """Return the experts whose training is not over, in their order."""
        return tuple(job for job in self.jobs if not is_fitted(job))


def divide(jobs: Sequence[ExpertJob], slots: int) -> list[Lane]:
    """Divide experts into at most `slots` lanes of about equal length, always in the same way, so that a rerun finds its checkpoints."""
    lanes = min(slots, len(jobs))
    return [Lane(tuple(jobs[first::lanes])) for first in range(lanes)]
