"""The image dataset in a run's folder: Parquet shards by skill, each written whole, each row named by its content.

images/skill=<skill>/<hash>.parquet          rendered rows
images/skill=<skill>/failed-<hash>.parquet   rows that failed, with their error; the next start tries them again
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from selma_ray.errors import RenderError
from selma_ray.images.config import ImagesConfig
from selma_ray.records import IMAGE_SCHEMA, content_id
from selma_ray.storage import RunFolder

__all__ = ["WriteImages", "check_failures", "existing_ids", "forget_failures", "image_summary", "read_images"]

_FAILED = "failed-"
_SHOWN_REASONS = 3


class WriteImages:
    """Writes rendered rows and passes on what progress needs of them."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __call__(self, rendered: pa.Table) -> pa.Table:
        """Write rows of RENDERED_SCHEMA; returns a light row for each."""
        write_shards(self._folder, rendered)
        return rendered.select(["id", "skill", "prompt", "error", "seconds"])


def write_shards(folder: RunFolder, rows: pa.Table) -> None:
    """Write rows (the columns of IMAGE_SCHEMA) as shards by skill; the same rows always make the same shard."""
    rows = pa.table([rows[name] for name in IMAGE_SCHEMA.names], schema=IMAGE_SCHEMA)
    for skill in rows["skill"].unique().to_pylist():
        of_skill = rows.filter(pc.equal(rows["skill"], skill))
        failed = pc.is_valid(of_skill["error"])
        _write_shard(folder, skill, "", of_skill.filter(pc.invert(failed)))
        _write_shard(folder, skill, _FAILED, of_skill.filter(failed))


def existing_ids(folder: RunFolder) -> frozenset[str]:
    """Return the ids of all rendered rows."""
    paths = [path for path in folder.files("images", suffix=".parquet") if not _is_failed(path)]
    return frozenset(folder.read_table(paths, columns=["id"])["id"].to_pylist()) if paths else frozenset()


def forget_failures(folder: RunFolder) -> None:
    """Delete the rows that failed, so that they are tried again."""
    for path in folder.files("images", suffix=".parquet"):
        if _is_failed(path):
            folder.delete(path)


def read_images(folder: RunFolder, skill: str) -> pa.Table:
    """Return a skill's rendered rows (IMAGE_SCHEMA), sorted by id."""
    paths = [path for path in folder.files("images", f"skill={skill}", suffix=".parquet") if not _is_failed(path)]
    return folder.read_table(paths).sort_by("id") if paths else IMAGE_SCHEMA.empty_table()


def image_summary(folder: RunFolder, skills: Sequence[str]) -> dict[str, Any]:
    """Return how many images were rendered and failed, in all and by skill, and the commonest reasons."""
    by_skill, reasons = {}, Counter[str]()
    for skill in skills:
        paths = folder.files("images", f"skill={skill}", suffix=".parquet")
        errors = folder.read_table(paths, columns=["error"])["error"].to_pylist() if paths else []
        failed = [error for error in errors if error is not None]
        reasons.update(failed)
        by_skill[skill] = {"rendered": len(errors) - len(failed), "failed": len(failed)}
    totals = {key: sum(counts[key] for counts in by_skill.values()) for key in ("rendered", "failed")}
    return {**totals, "reasons": dict(reasons.most_common(_SHOWN_REASONS)), "skills": by_skill}


def check_failures(summary: dict[str, Any], config: ImagesConfig) -> None:
    """Raise RenderError where an `image_summary` shows a larger share of failures than the recipe allows."""
    rendered, failed = summary["rendered"], summary["failed"]
    if failed > config.max_failed_fraction * (rendered + failed):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in summary["reasons"].items())
        raise RenderError(
            f"images.max_failed_fraction allows {config.max_failed_fraction:g}, {failed} of {rendered + failed} images "
            f"failed ({reasons}); mend the cause and run the same command again: failed images are tried again"
        )


def _write_shard(folder: RunFolder, skill: str, prefix: str, rows: pa.Table) -> None:
    if rows.num_rows:
        name = content_id(ids=sorted(rows["id"].to_pylist()))
        folder.write_table(rows, "images", f"skill={skill}", f"{prefix}{name}.parquet")


def _is_failed(path: str) -> bool:
    return PurePosixPath(path).name.startswith(_FAILED)
