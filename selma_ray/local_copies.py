"""What lies on object storage, for libraries that want local files: read through a bounded cache of this node, written whole.

Layout: <cache>/<id>/<name> is one object or the objects of one folder; the id names their place, sizes and times, so that a copy is
not read when they have changed (by the storage's clock: S3 counts seconds). SELMA_CACHE_DIR places the cache, SELMA_CACHE_GB bounds
it (50).
"""

import logging
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from selma_ray.errors import ConfigError, StorageError
from selma_ray.records import content_id
from selma_ray.replacing import replace_folder
from selma_ray.storage import READERS, RunFolder, StoredFile, storage_errors

__all__ = ["local_copy", "scratch_folder", "upload_folder", "whole_folder"]

logger = logging.getLogger(__name__)

_DEFAULT_CACHE_GB = "50"
_IN_USE_S = 3600.0  # what was asked for this lately may be being read


def local_copy(place: str | Path, only: Sequence[str] = ()) -> Path:
    """Return a local path of a file or folder: `place` itself where it is local, else a copy on this node's disk.

    Of a folder on object storage, `only` names the files that are wanted; those that are not there are left out. Raises StorageError
    where nothing is there or it cannot be read, ConfigError for a bound of the cache that is no number.
    """
    if "://" not in str(place):
        return Path(place)
    source = RunFolder(str(place))
    if source.is_local:
        return source.local_path()
    found = {name: file for name, file in _listing(source).items() if not only or name in ("", *only)}
    if not found:
        raise StorageError(f"{place} must hold {' and '.join(only) or 'an object'}, nothing is there")
    cache, bound_bytes = _cache(), _bound_bytes()
    target = cache / content_id(
        place=source.uri, files=[[name, file.size_bytes, file.changed_ns] for name, file in found.items()]
    )
    with storage_errors(str(target)):
        if target.is_dir():
            os.utime(target)
        else:
            _fetch(source, found, target)
            _evict(cache, bound_bytes)
    return target / source.name


def _listing(source: RunFolder) -> dict[str, StoredFile]:
    """Return the files of a folder, and say so where the store has to be waited for."""
    try:
        files = source.listing()
    except StorageError as error:
        logger.warning("%s; asking for up to a minute and a half more", error)
        source.wait_out_outages()
        return source.listing()
    source.wait_out_outages()
    return files


def scratch_folder(folder: RunFolder, *parts: str) -> Path:
    """Return a local folder for what is made on the way and can be made again: in the run's where that is local, else in the cache."""
    if folder.is_local:
        return folder.local_path(*parts)
    return _cache() / content_id(scratch=folder.path(*parts))


@contextmanager
def whole_folder(folder: RunFolder, *parts: str, last: str) -> Iterator[Path]:
    """Yield a new local folder whose files take the place of those at `parts` when the block ends without an error.

    Locally that is one rename. On object storage the object `last` is deleted first and written at the end, so that its being there
    means that all are.
    """
    if not folder.is_local:
        with tempfile.TemporaryDirectory() as temporary:
            part = Path(temporary, "folder")
            part.mkdir()
            yield part
            _replace_objects(folder, part, parts, last)
        return
    target = folder.local_path(*parts)
    for leftover in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    with storage_errors(str(target)):
        try:
            part.mkdir(parents=True)
            yield part
            replace_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def upload_folder(source: Path, folder: RunFolder, *parts: str) -> None:
    """Write all files below the local folder `source` to `parts`, one whole object each."""
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(READERS) as writers:
        list(writers.map(lambda name: folder.upload(source / name, *parts, name), names))


def _replace_objects(folder: RunFolder, part: Path, parts: Sequence[str], last: str) -> None:
    folder.delete(*parts, last)
    folder.delete(*parts)
    finish = part / last
    content = finish.read_bytes()
    finish.unlink()
    upload_folder(part, folder, *parts)
    folder.write_bytes(content, *parts, last)


def _fetch(source: RunFolder, found: dict[str, StoredFile], target: Path) -> None:
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    size_mb = sum(file.size_bytes for file in found.values()) / 1e6
    logger.info("fetching %s (%.1f MB)", source.uri, size_mb)
    try:
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(lambda name: source.download(part / source.name / name, name), found))
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _evict(cache: Path, bound_bytes: float) -> None:
    """Delete the copies that were asked for longest ago until the others fit, but none of the last hour."""
    entries = sorted((entry.stat().st_mtime, entry) for entry in cache.iterdir() if entry.is_dir())
    sizes = {entry: sum(path.stat().st_size for path in entry.rglob("*") if path.is_file()) for _, entry in entries}
    total = sum(sizes.values())
    for asked_at, entry in entries:
        if total <= bound_bytes:
            return
        if time.time() - asked_at > _IN_USE_S:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _cache() -> Path:
    named = os.environ.get("SELMA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else home / "selma_ray" / "objects"


def _bound_bytes() -> float:
    value = os.environ.get("SELMA_CACHE_GB", _DEFAULT_CACHE_GB)
    try:
        bound_gb = float(value)
    except ValueError:
        bound_gb = math.nan
    if not bound_gb > 0:
        raise ConfigError(
            f"SELMA_CACHE_GB must be a number above 0, got {value!r}; set it to gigabytes of this node's disk"
        )
    return bound_gb * 1e9
