"""Curves of an expert, of its training and of its dev scores, in every tracker that the recipe names."""

from collections.abc import Mapping
from typing import Literal

from PIL import Image

from selma_ray.config import identity
from selma_ray.experts.job import ExpertJob
from selma_ray.tracking.opening import open_tracker
from selma_ray.tracking.tracker import TrackedRun

__all__ = ["CurveLog", "log_scores"]


class CurveLog:
    """Logs the figures of every step."""

    def __init__(self, job: ExpertJob, steps_done: int) -> None:
        if steps_done == 0:  # another recipe's, or one without a checkpoint to go on from
            job.folder.delete(job.directory, "tensorboard")
        run = _tracked(job, "train", steps_done)
        self._trackers = [open_tracker(name, run) for name in job.config.trackers]

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Log one optimiser step, counted from 1."""
        named = {f"train/{name}": value for name, value in figures.items()}
        for tracker in self._trackers:
            tracker.log(named, step)

    def keep(self) -> None:
        """Write out what is buffered, with a checkpoint, after which none of it is logged again."""
        for tracker in self._trackers:
            tracker.keep()

    def close(self) -> None:
        """Write out what is buffered."""
        for tracker in self._trackers:
            tracker.close()


def log_scores(job: ExpertJob, scores: Mapping[str, float], samples: Mapping[str, Image.Image], step: int) -> None:
    """Log the dev scores of one checkpoint of an expert, and a few of the images they are of by their prompts."""
    named = {f"dev/{name}": value for name, value in scores.items()}
    run = _tracked(job, "dev")
    for name in job.config.trackers:
        tracker = open_tracker(name, run)
        tracker.log(named, step)
        tracker.log_images(samples, step)
        tracker.close()


def _tracked(job: ExpertJob, part: Literal["train", "dev"], steps_done: int = 0) -> TrackedRun:
    name = job.name if part == "train" else f"{job.name}-dev"
    settings = {"expert": job.name, "model": job.model.name, "seed": job.seed, "experts": identity(job.config)}
    return TrackedRun(job.folder, job.directory, name, f"{job.key[:16]}{part}", steps_done, settings)
