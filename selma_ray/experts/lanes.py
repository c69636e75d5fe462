"""Lanes: the experts that one Ray Train run fits, one after another or as one, so that its processes start once and not for each.

Where the cluster holds all experts at once, each has a lane of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selma_ray.experts.job import ExpertJob
from selma_ray.experts.selection import is_fitted
from selma_ray.records import content_id

__all__ = ["Lane", "divide", "lanes_of", "with_threads_of_renderers"]


@dataclass(frozen=True)
class Lane:
    """Experts that are fitted by the same processes, at least one. Pickles, for the workers."""

    jobs: tuple[ExpertJob, ...]
    fused: bool = False
    """Whether they are fitted as one, not one after another."""
    threads_per_worker: int | None = None
    """Threads of a worker's numeric libraries; default: one for each of its CPUs."""

    @property
    def num_threads(self) -> int:
        """Return the threads of a worker's numeric libraries."""
        return self.threads_per_worker or max(1, int(self.jobs[0].config.cpus_per_worker))

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


def with_threads_of_renderers(lanes: Sequence[Lane], num_cores: int) -> list[Lane]:
    """Give the only lane that is still at work, where it learns in rounds, its renderers' threads too, up to the machine's cores.

    They rest while it learns; where several lanes are at work, one's renderers draw while another learns.
    """
    at_work = [lane for lane in lanes if lane.unfitted()]
    if len(at_work) != 1 or (config := at_work[0].jobs[0].config).nft is None:
        return list(lanes)
    num_cpus = config.cpus_per_worker + config.nft.renderers * config.nft.cpus_per_renderer / config.workers_per_expert
    threads = max(1, min(int(num_cpus), num_cores))
    return [replace(lane, threads_per_worker=threads) if lane in at_work else lane for lane in lanes]
