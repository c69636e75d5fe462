"""TensorBoard's files, written while training goes on: experts/<name>/tensorboard/."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from selma_ray.local_copies import upload_folder
from selma_ray.tracking.tracker import TrackedRun

__all__ = ["TensorBoardTracker"]

_SUBFOLDER = "tensorboard"


class TensorBoardTracker:
    """A file of events: in the run's folder at once where that is mounted, else as a whole object whenever it is kept.

    TensorBoard appends to its files, which object storage cannot do. What a killed start logged after its last checkpoint is hidden.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._folder, self._parts = run.folder, (run.directory, _SUBFOLDER)
        self._temporary = None if run.folder.is_local else tempfile.TemporaryDirectory()
        self._directory = Path(self._temporary.name) if self._temporary else run.folder.local_path(*self._parts)
        self._writer = SummaryWriter(str(self._directory), purge_step=run.steps_done + 1 if run.steps_done else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log a scalar for each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Log an image for each caption."""
        for caption, image in images.items():
            self._writer.add_image(f"samples/{caption}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def keep(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Write out what is buffered, and close the file."""
        self._writer.close()
        self._upload()
        if self._temporary:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._temporary:
            upload_folder(self._directory, self._folder, *self._parts)
