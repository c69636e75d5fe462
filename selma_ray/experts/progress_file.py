"""How far an expert has come, told through the folder that all nodes share."""

import time

from selma_ray.experts.job import ExpertJob

__all__ = ["ProgressFile"]

_PROGRESS_EVERY_S = 1.0


class ProgressFile:
    """Tells the driver, about once a second, how far the expert has come, through the folder that all nodes share."""

    def __init__(self, job: ExpertJob) -> None:
        self._job = job
        self._written_s = float("-inf")

    def update(self, step: int, loss: float) -> None:
        """Write the step and its loss, where the last were written long enough ago."""
        due = time.monotonic() - self._written_s >= _PROGRESS_EVERY_S or step == self._job.config.steps
        if due:
            self._written_s = time.monotonic()
            self._job.folder.write_json({"step": step, "loss": loss}, self._job.directory, "progress.json")
