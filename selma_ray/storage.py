"""A run's folder on any filesystem pyarrow opens (local, s3://, gs://), written one whole object at a time.

A reader never sees half an object: locally a file is written beside its place and renamed over it; object stores show an
object when it is closed. Nothing is appended to and nothing is renamed on object stores.
"""

import errno
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from selma_ray.errors import StorageError
from selma_ray.outages import patient

__all__ = ["READERS", "ROW_GROUP_ROWS", "RunFolder", "StoredFile", "storage_errors"]

READERS = 16
"""Threads that read or write side by side: an object store answers late and many at once."""

ROW_GROUP_ROWS = 256
"""Rows of a Parquet file that are read together: what one worker takes of a large file."""

_PART_SUFFIX = ".part"
_CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class StoredFile:
    """What a storage says of a file without its being read."""

    size_bytes: int
    changed_ns: int | None


class RunFolder:
    """One run's folder; every path given to it is relative to its root. Pickles, so that actors on any node can hold it.

    A store that does not answer is an error within seconds, so that a wrong address is. Once work has begun, and in every process that the
    folder travels to, S3 is waited for (`wait_out_outages`); GCS is waited for by pyarrow.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())
        try:
            self._filesystem, self._root = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"run folder {uri!r} cannot be opened ({error}); use a path, s3://… or gs://…") from None
        self.is_local = isinstance(self._filesystem, fs.LocalFileSystem)

    def wait_out_outages(self) -> None:
        """From now on, ask S3 again for a minute and a half where it answers 503, or not in time."""
        self._filesystem = patient(self._filesystem)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_filesystem": patient(self._filesystem)}

    @property
    def name(self) -> str:
        """Return the last part of the root's path."""
        return PurePosixPath(self._root).name

    def __repr__(self) -> str:
        return f"RunFolder({self.uri!r})"

    def path(self, *parts: str) -> str:
        """Return the full path or URI of `parts` below the root."""
        if self.is_local:
            return str(PurePosixPath(self.uri, *parts))
        place, mark, options = self.uri.partition("?")
        return "/".join((place.rstrip("/"), *parts)) + mark + options

    def local_path(self, *parts: str) -> Path:
        """Return a local path below the root; raises StorageError where the run is not on a mounted filesystem."""
        if not self.is_local:
            raise StorageError(f"{self.uri} must be a mounted folder here; name a path")
        return Path(self.uri, *parts)

    def exists(self, *parts: str) -> bool:
        """Tell whether an object or folder stands at `parts`."""
        with _reading(self.path(*parts)):
            return self._filesystem.get_file_info(self._inner(*parts)).type != fs.FileType.NotFound

    def files(self, *parts: str, suffix: str = "") -> list[str]:
        """Return the sorted relative paths of all finished files below `parts` whose names end in `suffix`."""
        return [path for path in self.listing(*parts) if path and path.endswith(suffix)]

    def listing(self, *parts: str) -> dict[str, StoredFile]:
        """Return all finished files below `parts` by relative path, sorted; where the root is a file, that one, by the empty name."""
        place = self._inner(*parts)
        with _reading(self.path(*parts)):
            info = self._filesystem.get_file_info(self._root) if not parts else None
            if info is not None and info.type == fs.FileType.File:
                return {"": StoredFile(info.size, info.mtime_ns)}
            found = self._filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True, recursive=True))
        prefix = len(self._root.rstrip("/")) + 1
        return {
            info.path[prefix:]: StoredFile(info.size, info.mtime_ns)
            for info in sorted(found, key=lambda info: info.path)
            if info.type == fs.FileType.File and not info.path.endswith(_PART_SUFFIX)
        }

    def download(self, target: Path, *parts: str) -> None:
        """Copy an object to a local file; raises StorageError where it cannot be read."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _reading(self.path(*parts)):
            fs.copy_files(self._inner(*parts), str(target), source_filesystem=self._filesystem, chunk_size=_CHUNK_BYTES)

    def upload(self, source: Path, *parts: str) -> None:
        """Copy a local file to an object; raises StorageError where it cannot be written."""
        self._receive(fs.LocalFileSystem(), str(source), self._inner(*parts))

    def copy_files(self, target: "RunFolder", paths: Sequence[str]) -> None:
        """Copy files to the same paths of another folder; raises StorageError where one cannot be read or written."""
        with ThreadPoolExecutor(READERS) as copiers:
            list(
                copiers.map(
                    lambda path: target._receive(self._filesystem, self._inner(path), target._inner(path)), paths
                )
            )

    def _receive(self, filesystem: fs.FileSystem, source: str, target: str) -> None:
        with storage_errors(target):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(
                source, target, source_filesystem=filesystem, destination_filesystem=self._filesystem,
                chunk_size=_CHUNK_BYTES,
            )  # fmt: skip

    def place(self, *parts: str) -> tuple[fs.FileSystem, str]:
        """Return the filesystem and the path of `parts` on it, as libraries that write to pyarrow's filesystems take them."""
        return self._filesystem, self._inner(*parts)

    def read_bytes(self, *parts: str) -> bytes:
        """Return an object's bytes; raises StorageError where it cannot be read."""
        with (
            _reading(self.path(*parts)),
            self._filesystem.open_input_stream(self._inner(*parts), compression=None) as stream,
        ):
            return stream.read()

    def write_bytes(self, content: bytes | memoryview, *parts: str) -> None:
        """Write a whole object atomically; raises StorageError where the disk is full or the storage cannot be reached."""
        target = self._inner(*parts)
        with storage_errors(self.path(*parts)):
            if self.is_local:
                _replace_file(Path(target), content)
            else:
                with self._filesystem.open_output_stream(target, compression=None) as stream:
                    stream.write(content)

    def read_json(self, *parts: str) -> Any:
        """Return a JSON object's value; raises StorageError where it is unreadable."""
        try:
            return json.loads(self.read_bytes(*parts))
        except ValueError as error:
            raise StorageError(f"{self.path(*parts)} must be JSON ({error}); delete it to have it made again") from None

    def write_json(self, value: Any, *parts: str) -> None:
        """Write `value` as JSON, atomically."""
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), *parts)

    def read_table(self, paths: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of several Parquet files as one table; `paths` must not be empty."""
        wanted = list(columns) if columns else None
        with ThreadPoolExecutor(READERS) as readers:
            tables = list(readers.map(lambda path: self._read_table(path, wanted), paths))
        return pa.concat_tables(tables, promote_options="default")

    def read_row_group(self, path: str, group: int) -> pa.Table:
        """Return the rows of one row group of a Parquet file."""
        with _reading(self.path(path)), self._filesystem.open_input_file(self._inner(path)) as file:
            return pq.ParquetFile(file).read_row_group(group)

    def row_groups(self, path: str, columns: Sequence[str]) -> list[pa.Table]:
        """Return some columns of a Parquet file, row group by row group."""
        with _reading(self.path(path)), self._filesystem.open_input_file(self._inner(path)) as file:
            opened = pq.ParquetFile(file)
            return [opened.read_row_group(group, columns=list(columns)) for group in range(opened.num_row_groups)]

    def write_table(self, table: pa.Table, *parts: str) -> int:
        """Write `table` as one Parquet file, atomically, in row groups of `ROW_GROUP_ROWS`; returns its size in bytes."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        self.write_bytes(buffer.getbuffer(), *parts)
        return buffer.tell()

    def delete(self, *parts: str) -> None:
        """Delete an object or a whole folder; what is not there is no error."""
        with storage_errors(self.path(*parts)):
            info = self._filesystem.get_file_info(self._inner(*parts))
            if info.type == fs.FileType.Directory:
                self._filesystem.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self._filesystem.delete_file(info.path)

    def delete_files(self, paths: Sequence[str]) -> None:
        """Delete objects side by side; what is not there is no error."""
        with ThreadPoolExecutor(READERS) as deleters:
            list(deleters.map(self.delete, paths))

    def delete_partial(self, *parts: str) -> None:
        """Delete what killed writers left half-written below `parts`; only for when nothing writes there."""
        if self.is_local:
            for path in Path(self._inner(*parts)).rglob(f"*{_PART_SUFFIX}"):
                path.unlink(missing_ok=True)

    def mark_done(self, stage: str, summary: dict[str, Any]) -> None:
        """Record that `stage` is finished, with a summary for people and reports."""
        self.write_json(summary, "done", f"{stage}.json")

    def done(self, stage: str) -> dict[str, Any] | None:
        """Return the summary of a finished `stage`, or None."""
        return self.read_json("done", f"{stage}.json") if self.exists("done", f"{stage}.json") else None

    def _read_table(self, path: str, columns: list[str] | None) -> pa.Table:
        """Read one Parquet file, of its bytes only what the columns need."""
        with _reading(self.path(path)), self._filesystem.open_input_file(self._inner(path)) as file:
            return pq.read_table(file, columns=columns)

    def _inner(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *filter(None, parts)))


def _replace_file(target: Path, content: bytes | memoryview) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}{_PART_SUFFIX}")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn an OSError of writing `path` into a StorageError that names the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left to write {path}; free some and run the same command again") from None
        reason = " ".join(str(error).split())
        raise StorageError(
            f"{path} cannot be written: {reason}; fix the cause and run the same command again"
        ) from None


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn an error of reading `path` into a StorageError of one line."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
