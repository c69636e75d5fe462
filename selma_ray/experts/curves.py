"""Curves of training as TensorBoard files, written while it goes on: experts/<name>/tensorboard/."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from selma_ray.experts.job import ExpertJob

__all__ = ["CurveLog", "log_scalars"]


class CurveLog:
    """Logs the figures of every step; what a killed start logged after its last checkpoint is hidden."""

    def __init__(self, job: ExpertJob, steps_done: int) -> None:
        if steps_done == 0:
            job.folder.delete(
                job.directory, "tensorboard"
            )  # another recipe's, or one without a checkpoint to go on from
        directory = job.folder.local_path(job.directory, "tensorboard")
        self._writer = SummaryWriter(str(directory), purge_step=steps_done + 1 if steps_done else None)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Log one optimiser step, counted from 1."""
        for name, value in figures.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


def log_scalars(directory: Path, values: Mapping[str, float], step: int) -> None:
    """Log a few values of one step, in a file of their own."""
    with SummaryWriter(str(directory)) as writer:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
