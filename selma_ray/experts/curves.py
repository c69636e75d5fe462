"""Curves of training as TensorBoard files, written while it goes on: experts/<name>/tensorboard/."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from selma_ray.experts.job import ExpertJob
from selma_ray.local_copies import upload_folder

__all__ = ["CurveLog", "log_scalars"]


class CurveLog:
    """Logs the figures of every step; what a killed start logged after its last checkpoint is hidden."""

    def __init__(self, job: ExpertJob, steps_done: int) -> None:
        if steps_done == 0:
            job.folder.delete(
                job.directory, "tensorboard"
            )  # another recipe's, or one without a checkpoint to go on from
        self._files = _EventFiles(job)
        self._writer = SummaryWriter(str(self._files.directory), purge_step=steps_done + 1 if steps_done else None)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Log one optimiser step, counted from 1."""
        for name, value in figures.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def keep(self) -> None:
        """Write out what is buffered, with a checkpoint, after which none of it is logged again."""
        self._writer.flush()
        self._files.keep()

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()
        self._files.keep()
        self._files.close()


def log_scalars(job: ExpertJob, values: Mapping[str, float], step: int) -> None:
    """Log a few values of one step of an expert, in a file of their own."""
    files = _EventFiles(job)
    with SummaryWriter(str(files.directory)) as writer:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
    files.keep()
    files.close()


class _EventFiles:
    """A local folder whose event files are in the run's folder: at once where that is mounted, else as whole objects when kept.

    TensorBoard appends to its files, which object storage cannot do.
    """

    def __init__(self, job: ExpertJob) -> None:
        self._folder, self._parts = job.folder, (job.directory, "tensorboard")
        self._temporary = None if job.folder.is_local else tempfile.TemporaryDirectory()
        self.directory = Path(self._temporary.name) if self._temporary else job.folder.local_path(*self._parts)

    def keep(self) -> None:
        if self._temporary:
            upload_folder(self.directory, self._folder, *self._parts)

    def close(self) -> None:
        if self._temporary:
            self._temporary.cleanup()
