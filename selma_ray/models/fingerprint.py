"""The hash of a model's files: every byte of every file, read once and remembered by path, size and time of change."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["fingerprint"]

_DIGITS = 16
_Stamp = tuple[int, int]  # size in bytes, time of change in ns
_remembered: dict[str, tuple[_Stamp, str]] = {}


def fingerprint(folder: Path) -> str:
    """Return a hash of all files of a folder, by their paths in it and their whole content; linked files and folders count as well.

    A file that has its size and time of change since it was read is not read again, in this process or another of this user.
    """
    digest = hashlib.sha256()
    known = _Remembered()
    for path in sorted(_files(folder)):
        digest.update(f"{path.relative_to(folder).as_posix()}:{known.digest(path)}:".encode())
    known.save()
    return digest.hexdigest()[:_DIGITS]


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, through links too; a link back to a folder above is not followed again."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names if Path(place, name).is_file())


class _Remembered:
    """Digests of files, in this process and in the user's cache."""

    def __init__(self) -> None:
        self._path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selma_ray" / "file_hashes.json"
        self._stored: dict[str, list[int | str]] | None = None
        self._changed = False

    def digest(self, path: Path) -> str:
        real, status = str(path.resolve()), path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        remembered = _remembered.get(real)
        if remembered is None or remembered[0] != stamp:
            remembered = (stamp, self._from_store(real, stamp) or self._read(path))
            _remembered[real] = remembered
        return remembered[1]

    def save(self) -> None:
        """Keep what was read; another process's may be lost in a race, and is then read again."""
        if not self._changed:
            return
        stored = self._load() | {path: [*stamp, digest] for path, (stamp, digest) in _remembered.items()}
        part = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.part")
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(stored))
            part.replace(self._path)

    def _from_store(self, real: str, stamp: _Stamp) -> str | None:
        if self._stored is None:
            self._stored = self._load()
        entry = self._stored.get(real)
        return str(entry[2]) if entry and (entry[0], entry[1]) == stamp else None

    def _load(self) -> dict[str, list[int | str]]:
        try:
            stored = json.loads(self._path.read_text())
            return {str(path): [int(entry[0]), int(entry[1]), str(entry[2])] for path, entry in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError, IndexError):
            return {}

    def _read(self, path: Path) -> str:
        self._changed = True
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
