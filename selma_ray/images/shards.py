"""The image dataset in a run's folder: Parquet shards by skill, each written whole, each row named by its content.

images/skill=<skill>/<split>-<width>x<height>-<hash>.parquet   rendered rows of one split and size, put together as they come; those of
                                                               `rejected` were not chosen
candidates/skill=<skill>/<hash>.parquet   rendered rows of whole prompts that a judge is yet to choose from
failures/skill=<skill>/<hash>.parquet     rows that failed, with their error; the next start tries them again
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from selma_ray.errors import RenderError, StorageError
from selma_ray.images.config import ImagesConfig
from selma_ray.records import IMAGE_SCHEMA, content_id
from selma_ray.storage import RunFolder

__all__ = [
    "candidate_shards",
    "check_failures",
    "count_candidates",
    "drop_duplicates",
    "existing_ids",
    "forget_failures",
    "image_summary",
    "kind_of_shard",
    "read_images",
    "replace_shards",
    "shards_of",
    "sizes_of_shards",
    "splits_of_shards",
    "too_many_failures",
    "write_candidates",
    "write_shards",
]

_IMAGES, _CANDIDATES, _FAILURES = "images", "candidates", "failures"
_REJECTED = "rejected"
_SHOWN_REASONS = 3


def write_shards(folder: RunFolder, rows: pa.Table) -> dict[str, int]:
    """Write rows (the columns of IMAGE_SCHEMA) as shards by skill, split and size; the same rows always make the same shards.

    Returns the sizes in bytes of the shards of rendered rows, by path.
    """
    rows = _image_rows(rows)
    written: dict[str, int] = {}
    for skill in rows["skill"].unique().to_pylist():
        of_skill = rows.filter(pc.equal(rows["skill"], skill))
        # A failed image among others of its prompt, of which some were chosen, is rejected for good.
        failed = pc.and_(pc.is_valid(of_skill["error"]), pc.not_equal(of_skill["split"], _REJECTED))
        rendered = of_skill.filter(pc.invert(failed))
        # Rejected rows first: what was chosen is rendered and chosen again by a start after a kill in between, what was not would be.
        for split in sorted(rendered["split"].unique().to_pylist(), key=lambda split: split != _REJECTED):
            for (width, height), of_size in _by_size(rendered.filter(pc.equal(rendered["split"], split))):
                written |= _write_shard(folder, _IMAGES, skill, of_size, f"{split}-{width}x{height}-")
        _write_shard(folder, _FAILURES, skill, of_skill.filter(failed))
    return written


def replace_shards(folder: RunFolder, paths: Sequence[str]) -> None:
    """Put shards of rendered rows together; they go when what takes their place is written, and no row is in it twice."""
    rows = folder.read_table(paths)
    first = dict(reversed([(id_, place) for place, id_ in enumerate(rows["id"].to_pylist())]))
    written = write_shards(folder, rows.take(sorted(first.values())))
    folder.delete_files([path for path in paths if path not in written])


def sizes_of_shards(folder: RunFolder) -> dict[str, int]:
    """Return the sizes in bytes of all shards of rendered rows, by path, sorted."""
    return {path: file.size_bytes for path, file in folder.listing(_IMAGES).items() if path.endswith(".parquet")}


def kind_of_shard(path: str) -> str:
    """Return what shards that may be put together have in common: skill, split and size."""
    return path.rpartition("-")[0]


def write_candidates(folder: RunFolder, rows: pa.Table) -> None:
    """Write rows (the columns of IMAGE_SCHEMA) that a judge is to choose from; those of prompts of which none was rendered are failures."""
    rows = pa.table([rows[name] for name in IMAGE_SCHEMA.names], schema=IMAGE_SCHEMA)
    keys = list(zip(rows["skill"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
    rendered = {key for key, error in zip(keys, rows["error"].to_pylist(), strict=True) if error is None}
    there = pa.array([key in rendered for key in keys], pa.bool_())
    write_shards(folder, rows.filter(pc.invert(there)))
    candidates = rows.filter(there)
    for skill in candidates["skill"].unique().to_pylist():
        _write_shard(folder, _CANDIDATES, skill, candidates.filter(pc.equal(candidates["skill"], skill)))


def candidate_shards(folder: RunFolder) -> list[str]:
    """Return the paths of all shards that a judge is yet to choose from."""
    return folder.files(_CANDIDATES, suffix=".parquet")


def count_candidates(folder: RunFolder) -> int:
    """Return how many rendered images a judge is yet to choose from."""
    return _columns(folder, ["id"], _CANDIDATES).num_rows


def shards_of(folder: RunFolder, skill: str) -> list[str]:
    """Return the paths of a skill's shards of rendered rows."""
    return folder.files(_IMAGES, f"skill={skill}", suffix=".parquet")


def existing_ids(folder: RunFolder) -> frozenset[str]:
    """Return the ids of all rows that need not be rendered any more."""
    return frozenset(id_ for kind in (_IMAGES, _CANDIDATES) for id_ in _columns(folder, ["id"], kind)["id"].to_pylist())


def splits_of_shards(folder: RunFolder, skills: Sequence[str]) -> list[str]:
    """Return the splits of which there are rendered rows, and write shards that hold several, as earlier versions did, one by one."""
    found = set()
    for path in (path for skill in skills for path in shards_of(folder, skill)):
        split, dash, _ = path.rpartition("/")[2].partition("-")
        if not dash:
            replaced = write_shards(folder, folder.read_table([path]))
            folder.delete(path)
            found |= {name.rpartition("/")[2].partition("-")[0] for name in replaced}
        else:
            found.add(split)
    return sorted(found)


def drop_duplicates(folder: RunFolder) -> int:
    """Delete rows that a shard before them has too; returns how many there were.

    A killed driver's workers may live for a moment and write what the next start renders again.
    """
    paths = folder.files(_IMAGES, suffix=".parquet")
    if not paths or _all_different(folder.read_table(paths, columns=["id"])["id"]):
        return 0
    seen: set[str] = set()
    dropped = 0
    sizes_bytes = sizes_of_shards(folder)
    # The largest first: what was put together and not deleted yet goes as a whole.
    for path in sorted(paths, key=lambda path: (-sizes_bytes[path], path)):
        ids = folder.read_table([path], columns=["id"])["id"].to_pylist()
        new = [id_ not in seen for id_ in ids]
        seen.update(ids)
        if not all(new):
            write_shards(folder, folder.read_table([path]).filter(pa.array(new)))
            folder.delete(path)
            dropped += new.count(False)
    return dropped


def _all_different(ids: pa.ChunkedArray) -> bool:
    return pc.count_distinct(ids).as_py() == len(ids)


def forget_failures(folder: RunFolder) -> None:
    """Delete the rows that failed, so that they are tried again."""
    folder.delete(_FAILURES)


def read_images(folder: RunFolder, skill: str) -> pa.Table:
    """Return a skill's rendered rows (IMAGE_SCHEMA), sorted by id."""
    paths = shards_of(folder, skill)
    return folder.read_table(paths).sort_by("id") if paths else IMAGE_SCHEMA.empty_table()


def image_summary(folder: RunFolder, skills: Sequence[str]) -> dict[str, Any]:
    """Return how many images were rendered, rejected and failed, in all and by skill, and the commonest reasons."""
    by_skill, reasons = {}, Counter[str]()
    for skill in skills:
        # A shard that is just being put together with others may show its rows twice.
        rows = _columns(folder, ["id", "split"], _IMAGES, f"skill={skill}").group_by("id").aggregate([("split", "min")])
        errors = _columns(folder, ["error"], _FAILURES, f"skill={skill}")["error"].to_pylist()
        reasons.update(errors)
        rejected = pc.sum(pc.equal(rows["split_min"], _REJECTED)).as_py() or 0
        by_skill[skill] = {"rendered": rows.num_rows - rejected, "rejected": rejected, "failed": len(errors)}
    totals = {key: sum(counts[key] for counts in by_skill.values()) for key in ("rendered", "rejected", "failed")}
    return {**totals, "reasons": dict(reasons.most_common(_SHOWN_REASONS)), "skills": by_skill}


def check_failures(summary: dict[str, Any], config: ImagesConfig) -> None:
    """Raise RenderError where an `image_summary` shows a larger share of failures than the recipe allows."""
    failed, tried = summary["failed"], sum(summary[key] for key in ("rendered", "rejected", "failed"))
    if failed > config.max_failed_fraction * tried:
        raise too_many_failures(failed, tried, summary["reasons"], config)


def too_many_failures(failed: int, total: int, reasons: Mapping[str, int], config: ImagesConfig) -> RenderError:
    """Return the error that names the share of failures that a recipe allows, the share there is, and why."""
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return RenderError(
        f"images.max_failed_fraction allows {config.max_failed_fraction:g}, {failed} of {total} images "
        f"failed ({listed}); fix the cause and run the same command again: failed images are tried again"
    )


def _image_rows(rows: pa.Table) -> pa.Table:
    """Return rows with the columns of IMAGE_SCHEMA; those that an earlier version did not have are null."""
    missing = {name: pa.nulls(rows.num_rows, IMAGE_SCHEMA.field(name).type) for name in IMAGE_SCHEMA.names}
    columns = [rows[name] if name in rows.column_names else missing[name] for name in IMAGE_SCHEMA.names]
    return pa.table(columns, schema=IMAGE_SCHEMA)


def _by_size(rows: pa.Table) -> list[tuple[tuple[int, int], pa.Table]]:
    """Return rows of one size each, with their width and height in pixels: what is encoded for training together."""
    sizes = list(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True))
    return [(size, rows.filter(pa.array([each == size for each in sizes], pa.bool_()))) for size in sorted(set(sizes))]


def _write_shard(folder: RunFolder, kind: str, skill: str, rows: pa.Table, prefix: str = "") -> dict[str, int]:
    """Write rows as one shard; returns its size in bytes by its path, or nothing where there are no rows."""
    if not rows.num_rows:
        return {}
    path = f"{kind}/skill={skill}/{prefix}{content_id(ids=sorted(rows['id'].to_pylist()))}.parquet"
    return {path: folder.write_table(rows, path)}


def _columns(folder: RunFolder, columns: Sequence[str], *parts: str) -> pa.Table:
    """Return columns of all shards below `parts`; lists them anew where some were put together between listing and reading."""
    paths = folder.files(*parts, suffix=".parquet")
    while paths:
        try:
            return folder.read_table(paths, columns)
        except StorageError:
            listed = folder.files(*parts, suffix=".parquet")
            if set(paths) <= set(listed):
                raise
            paths = listed
    return IMAGE_SCHEMA.empty_table().select(list(columns))
