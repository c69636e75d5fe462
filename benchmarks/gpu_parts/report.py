"""What was found, written to a JSON file after every figure, so that a kill loses nothing; and how much time is left."""

import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu_parts.device import free_memory

__all__ = ["OutOfTimeError", "Report"]

logger = logging.getLogger(__name__)

Found = TypeVar("Found", bound=Mapping[str, Any])


class OutOfTimeError(BaseException):
    """A part has used up its time; no Exception, so that nothing takes it for a failure of its own and goes on."""


class Report:
    """Figures by part and case; a measurement that fails leaves its error in the figure's place."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {**header, "parts": {}}
        self._ends_s = float("inf")
        self._write()

    def seconds_left(self) -> float:
        """Return how long the part in progress may go on."""
        return self._ends_s - time.monotonic()

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """Run a part for so many seconds at the most; what it has found by then is kept."""
        started_s = time.monotonic()
        self._ends_s = started_s + seconds
        self.found["parts"][name] = {}
        before = signal.signal(signal.SIGALRM, _out_of_time)
        # Measurements end by themselves as their time runs out; the alarm is for one that hangs.
        signal.setitimer(signal.ITIMER_REAL, max(1.0, 1.1 * seconds))
        try:
            yield
        except OutOfTimeError:
            self.put(name, "error", f"stopped after {seconds:.0f} s")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            free_memory()
            self.put(name, "seconds", round(time.monotonic() - started_s, 1))

    @contextmanager
    def share(self, of_what_is_left: float) -> Iterator[None]:
        """Give what runs within a share of the time that the part in progress has left."""
        whole = self._ends_s
        self._ends_s = time.monotonic() + of_what_is_left * self.seconds_left()
        try:
            yield
        finally:
            self._ends_s = whole

    def measure(self, part: str, case: str, function: Callable[[], Found]) -> Found | None:
        """Return the figures that `function` finds, and write them down with the seconds it took; None where it fails."""
        print(f"{part}: {case} …", file=sys.stderr, flush=True)
        started_s = time.monotonic()
        try:
            found = function()
        except Exception as error:
            logger.debug("%s: %s failed", part, case, exc_info=True)
            self.put(part, case, {"error": _line(error), "at": _place(error)})
            return None
        finally:
            free_memory()
        self.put(part, case, {**found, "took_s": round(time.monotonic() - started_s, 1)})
        return found

    def put(self, part: str, case: str, found: Any) -> None:
        """Write a figure down."""
        self.found["parts"].setdefault(part, {})[case] = found
        self._write()

    @property
    def errors(self) -> list[str]:
        """Return which cases failed, and why."""
        return [
            f"{part}, {case}: {found if isinstance(found, str) else found['error']}"
            for part, cases in self.found["parts"].items()
            for case, found in cases.items()
            if case == "error" or (isinstance(found, dict) and "error" in found)
        ]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=2) + "\n")
        part.replace(self.path)


def _out_of_time(*_: Any) -> None:
    raise OutOfTimeError


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _place(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
