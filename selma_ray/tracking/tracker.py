"""What a tracker takes, and what it is told about the run that it tracks. Loads no client."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from selma_ray.storage import RunFolder

__all__ = ["PROJECT", "TrackedRun", "Tracker"]

PROJECT = "selma_ray"
"""The project, or experiment, of a run where the environment names none."""


@dataclass(frozen=True)
class TrackedRun:
    """One curve to track: that of an expert's training, or of its dev scores, each written by a process of its own."""

    folder: RunFolder
    directory: str
    """The expert's folder, relative to the run's."""
    name: str
    """What people read: an expert, or an expert and `dev`."""
    key: str
    """What all starts of the same curve share, and nothing else does: letters and digits."""
    steps_done: int = 0
    """Steps that an earlier start has logged and that count."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's settings, as plain values."""

    @property
    def group(self) -> str:
        """Return what the curves of one run of a recipe share."""
        return self.folder.name


class Tracker(Protocol):
    """A curve that is open in one client; used by one thread."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures of one step, counted from 1, by names such as train/loss."""

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Log a few sample images by their captions."""

    def keep(self) -> None:
        """Write out what is buffered: a checkpoint is kept, after which none of it is logged again."""

    def close(self) -> None:
        """Write out what is buffered and let go of the client."""
