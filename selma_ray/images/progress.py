"""How far rendering has come: followed by the driver, and written into the run's folder for whoever wants to know.

progress/generate.json   written every few seconds: counts, rates and times of the latest start, and how often there was one
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ray.data import Dataset

from selma_ray.cluster.errors import actor_failure
from selma_ray.cluster.metrics import count
from selma_ray.errors import RenderError
from selma_ray.images.config import ImagesConfig
from selma_ray.images.in_flight import take_lost
from selma_ray.images.shards import drop_duplicates, existing_ids, too_many_failures
from selma_ray.storage import RunFolder

__all__ = ["RenderingProgress", "follow", "read_progress"]

_PATH = ("progress", "generate.json")
_WRITE_EVERY_S = 3.0


@dataclass(frozen=True)
class RenderingProgress:
    """Counts are images; times are seconds since the epoch."""

    total: int
    """Images that the run comes to."""
    found: int = 0
    """Images that earlier starts had finished."""
    rendered: int = 0
    """Images that this start finished, rejected ones among them."""
    rejected: int = 0
    """Images that this start finished and a selection did not choose."""
    failed: int = 0
    """Images that failed in this start."""
    again: int = 0
    """Images rendered again in all starts, because a process or a start ended while they were in flight."""
    starts: int = 1
    """How often the run was started."""
    started_at: float = 0.0
    """When this start began."""
    first_image_at: float | None = None
    """When this start finished its first batch; engines take their time to load before."""
    updated_at: float = 0.0
    """When this was written."""
    ended: bool = False
    """Whether this start came to its end."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why images failed, each with its count."""

    @property
    def done(self) -> int:
        """Return the images that are finished."""
        return self.found + self.rendered

    @property
    def images_per_s(self) -> float | None:
        """Return the rate since the first batch of this start; None before the second."""
        elapsed_s = self.updated_at - (self.first_image_at or self.updated_at)
        return self.rendered / elapsed_s if elapsed_s > 0 else None

    @property
    def words(self) -> str:
        """Return rate, time left, rejections and failures in one line."""
        rate = "images: starting" if self.images_per_s is None else f"images: {self.images_per_s:.3g}/s"
        left = "" if self.seconds_left is None else f", {self.seconds_left / 60:.1f} min left"
        rejected = f", {self.rejected} not chosen" if self.rejected else ""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{rate}{left}{rejected}, {self.failed} failed" + (f" ({reasons})" if reasons else "")

    @property
    def seconds_left(self) -> float | None:
        """Return the time left at this rate, where there is one."""
        return None if not self.images_per_s else max(0, self.total - self.done - self.failed) / self.images_per_s


def follow(
    images: Dataset, folder: RunFolder, config: ImagesConfig, total: int
) -> Iterator[tuple[dict[str, Any], RenderingProgress]]:
    """Run the stream and yield each of its rows with the progress so far; writes the progress as it goes.

    Raises RenderError as soon as more images have failed than the recipe allows of all, and where a renderer cannot start.
    """
    progress = _opened(folder, total)
    reasons = Counter[str]()
    written_s = time.monotonic()
    for row in _rows(images):
        if row["error"] is not None:
            reasons[row["error"]] += 1
        progress = _advanced(progress, row, reasons)
        _count(row, folder.uri)
        if progress.failed > config.max_failed_fraction * total:
            _write(folder, progress)
            raise too_many_failures(progress.failed, total, dict(reasons.most_common(3)), config)
        if time.monotonic() - written_s >= _WRITE_EVERY_S:
            written_s = time.monotonic()
            _write(folder, progress)
        yield row, progress
    for part in ("prompts", "images", "failures", "in_flight"):
        folder.delete_partial(part)
    if dropped := drop_duplicates(folder):
        progress = replace(progress, again=progress.again + dropped)
    _write(folder, replace(progress, ended=True, updated_at=time.time()))


def _rows(images: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stream; raises RenderError where a renderer cannot start."""
    try:
        yield from images.iter_rows()
    except Exception as error:
        failure = actor_failure(error, "RenderPrompts")
        if failure is None or not failure.could_not_start:
            raise
        raise RenderError(f"a renderer cannot start: {failure.reason}; fix the recipe's model or images") from error


def read_progress(folder: RunFolder) -> RenderingProgress | None:
    """Return what the latest start wrote, or None where there was none."""
    return RenderingProgress(**folder.read_json(*_PATH)) if folder.exists(*_PATH) else None


def _opened(folder: RunFolder, total: int) -> RenderingProgress:
    """Return the progress of a new start, which counts what the one before it lost in flight."""
    before, found = read_progress(folder), existing_ids(folder)
    progress = RenderingProgress(
        total,
        found=len(found),
        again=(before.again if before else 0) + take_lost(folder, found),
        starts=before.starts + 1 if before else 1,
        started_at=time.time(),
        updated_at=time.time(),
    )
    _write(folder, progress)
    return progress


def _advanced(progress: RenderingProgress, row: dict[str, Any], reasons: Counter[str]) -> RenderingProgress:
    now, failed = time.time(), row["error"] is not None and row["split"] != "rejected"
    return replace(
        progress,
        rendered=progress.rendered + (not failed),
        rejected=progress.rejected + (row["split"] == "rejected"),
        failed=progress.failed + failed,
        again=progress.again + bool(row["again"]),
        first_image_at=progress.first_image_at or now,
        updated_at=now,
        reasons=dict(reasons.most_common(3)),
    )


def _count(row: dict[str, Any], run: str) -> None:
    """Count an image for whoever watches the cluster."""
    counted = {
        "selma_images_rendered": row["error"] is None,
        "selma_images_rejected": row["split"] == "rejected",
        "selma_images_failed": row["error"] is not None and row["split"] != "rejected",
        "selma_images_scored": row["score"] is not None,
        "selma_render_seconds": row["seconds"] or 0,
    }
    for name, amount in counted.items():
        count(name, amount, run, "generate")


def _write(folder: RunFolder, progress: RenderingProgress) -> None:
    folder.write_json(asdict(progress), *_PATH)
