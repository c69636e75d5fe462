"""Which images are being rendered right now, written down so that neither a killed process nor a killed run hides it.

in_flight/batch-<hash>.json   ids of a batch, from before it is rendered until its images are written
in_flight/row-<id>.json       a row that is rendered alone because its batch did not come back, and how often that was begun

What is left here when a run starts again was lost in flight; what a renderer finds here took an earlier process with it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["begin_batch", "begin_row", "finish_batches", "finish_row", "take_lost"]

_FOLDER = "in_flight"


def begin_batch(folder: RunFolder, ids: Sequence[str]) -> tuple[str, bool]:
    """Record that a batch is begun; returns its key and whether it was begun before and did not come back."""
    key = content_id(ids=list(ids))
    path = _batch_path(key)
    if folder.exists(*path):
        return key, True
    folder.write_json({"ids": list(ids)}, *path)
    return key, False


def begin_row(folder: RunFolder, id_: str, limit: int) -> int:
    """Record that a row is begun alone unless that happened `limit` times; returns how often it did not come back."""
    path = (_FOLDER, f"row-{id_}.json")
    begun: int = folder.read_json(*path)["begun"] if folder.exists(*path) else 0
    if begun < limit:
        folder.write_json({"begun": begun + 1}, *path)
    return begun


def finish_row(folder: RunFolder, id_: str) -> None:
    """Record that a row that was begun alone came back, whatever came of it."""
    folder.delete(_FOLDER, f"row-{id_}.json")


def finish_batches(folder: RunFolder, keys: Iterable[str]) -> None:
    """Record that the images of batches are written."""
    for key in keys:
        folder.delete(*_batch_path(key))


def take_lost(folder: RunFolder, finished_ids: Iterable[str]) -> int:
    """Return how many images were in flight when an earlier start ended, and forget them."""
    paths = folder.files(_FOLDER, suffix=".json")
    records: list[dict[str, Any]] = [folder.read_json(path) for path in paths]
    lost = {id_ for record in records for id_ in record.get("ids", ())}.difference(finished_ids)
    folder.delete(_FOLDER)
    return len(lost)


def _batch_path(key: str) -> tuple[str, str]:
    return _FOLDER, f"batch-{key}.json"
