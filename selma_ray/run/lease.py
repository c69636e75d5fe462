"""One driver at a time on a run's folder: a lease with a heartbeat, so that a second one is told who works there and since when."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selma_ray.errors import ConfigError, StorageError
from selma_ray.storage import RunFolder

__all__ = ["held", "seconds_since_sign"]

logger = logging.getLogger(__name__)

_LEASE = "lease.json"
_FIELDS = {"holder", "host", "pid", "started", "since", "beat", "renewed_at"}
_BEAT_EVERY_S = 10.0
_SILENT_AFTER_S = 3 * _BEAT_EVERY_S
_POLL_S = 1.0

_held_here: set[str] = set()


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Hold a run's folder for the block; inside another such block of this process it does nothing.

    The lease of a driver that is gone is taken over: at once where it ran on this machine, else when its heartbeat stays away. Raises
    ConfigError where another driver works on the folder.
    """
    if folder.uri in _held_here:
        yield
        return
    _refuse_holder(folder)
    lease = _Heartbeat(RunFolder(folder.uri))  # one that does not wait, as beats are soon of no use
    folder.wait_out_outages()
    _held_here.add(folder.uri)
    try:
        yield
    finally:
        _held_here.discard(folder.uri)
        lease.end()


def seconds_since_sign(folder: RunFolder) -> float | None:
    """Return how long ago a driver last said that it works on a folder; None where none holds it."""
    lease = _read(folder)
    return None if lease is None else max(0.0, time.time() - lease["renewed_at"])


class _Heartbeat:
    """Writes the lease anew from a thread of its own until it is ended."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lease: dict[str, Any] = {
            "holder": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"), "beat": 0,
            "renewed_at": time.time(),
        }  # fmt: skip
        self._ended = threading.Event()
        self._folder.write_json(self._lease, _LEASE)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Give the folder back."""
        self._ended.set()
        self._thread.join()
        try:
            current = _read(self._folder)
            if current and current["holder"] == self._lease["holder"]:
                self._folder.delete(_LEASE)
        except StorageError as error:  # it says nothing of the work; the lease ends by its silence
            logger.warning("the lease of %s was not given back: %s", self._folder.uri, error)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_EVERY_S):
            self._lease |= {"beat": self._lease["beat"] + 1, "renewed_at": time.time()}
            try:
                self._folder.write_json(self._lease, _LEASE)
            except StorageError as error:
                logger.warning("the lease of %s was not renewed: %s", self._folder.uri, error)


def _refuse_holder(folder: RunFolder) -> None:
    """Return when nobody holds the folder any more; raises ConfigError for a holder that lives."""
    lease = _read(folder)
    if lease is None:
        return
    if lease["host"] == socket.gethostname():
        alive = _process_start(lease["pid"]) == lease["started"] and lease["started"] is not None
    else:
        logger.warning(
            "%s: looking for up to %d s whether it still works there", _words(folder, lease), _SILENT_AFTER_S
        )
        alive = _beats(folder, lease)
    if alive:
        raise ConfigError(f"{_words(folder, lease)}; wait for it, end it, or set run_dir to another folder")


def _beats(folder: RunFolder, lease: dict[str, Any]) -> bool:
    """Tell whether a lease is renewed while one looks."""
    deadline_s = time.monotonic() + _SILENT_AFTER_S
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        now = _read(folder)
        if now is None:
            return False
        if (now["holder"], now["beat"]) != (lease["holder"], lease["beat"]):
            return True
    return False


def _words(folder: RunFolder, lease: dict[str, Any]) -> str:
    return f"{folder.uri} is held by process {lease['pid']} on {lease['host']} since {lease['since']}"


def _read(folder: RunFolder) -> dict[str, Any] | None:
    """Return the lease; one that cannot be read is nobody's."""
    if not folder.exists(_LEASE):
        return None
    try:
        lease = folder.read_json(_LEASE)
        return lease if lease.keys() >= _FIELDS else None
    except (StorageError, AttributeError):
        return None


def _process_start(pid: int) -> int | None:
    """Return when a process of this machine began, in ticks since boot, which tells it from a later one of its number; None for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
