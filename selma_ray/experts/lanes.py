"""Lanes: the experts that one Ray Train run fits, one after another or as one, so that its processes start once and not for each.

Where the cluster holds all experts at once, each has a lane of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from selma_ray.experts.job import ExpertJob
from selma_ray.experts.selection import is_fitted
from selma_ray.records import content_id

__all__ = ["Lane", "divide", "lanes_of"]


@dataclass(frozen=True)
class Lane:
    """Experts that are fitted by the same processes, at least one. Pickles, for the workers."""

    jobs: tuple[ExpertJob, ...]
    fused: bool = False
    """Whether they are fitted as one, not one after another."""

    @property
    def directory(self) -> str:
        """Return the folder that holds the lane's checkpoints, relative to the run's: its first expert's."""
        return self.jobs[0].directory

    @property
    def checkpoints(self) -> str:
        """Return the name of the folder of checkpoints inside `directory`; another lane's are never restored."""
        fused = {"fused": True} if self.fused else {}
        return f"checkpoints-{content_id(experts=[job.key for job in self.jobs], **fused)[:12]}"

    def unfitted(self) -> tuple[ExpertJob, ...]:
        """Return the experts whose training is not over, in their order."""
        return tuple(job for job in self.jobs if not is_fitted(job))


def lanes_of(jobs: Sequence[ExpertJob], slots: int) -> list[Lane]:
    """Return the lanes of a wave: one of all experts that can be fitted as one, where the recipe asks for it, and those of the others."""
    alike = [job for job in jobs if job.config.fused and not job.experts and job.config == jobs[0].config]
    if len(alike) < 2:
        return divide(jobs, slots)
    others = [job for job in jobs if job not in alike]
    return [Lane(tuple(alike), fused=True), *(divide(others, max(1, slots - 1)) if others else [])]


def divide(jobs: Sequence[ExpertJob], slots: int) -> list[Lane]:
    """Divide experts into at most `slots` lanes of about equal length, always in the same way, so that a rerun finds its checkpoints."""
    lanes = min(slots, len(jobs))
    return [Lane(tuple(jobs[first::lanes])) for first in range(lanes)]
