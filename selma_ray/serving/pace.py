"""What images cost here, measured while they are drawn: the seconds of a step and of decoding, by size."""

import threading
from collections import deque
from statistics import median

__all__ = ["Pace"]

_REMEMBERED = 9  # the median of as many is not moved by the first of a size, for which libraries prepare their kernels

Size = tuple[int, int]


class Pace:
    """Measured seconds by size; a size that was not drawn yet is estimated from the one nearest to it, by area.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._row_step_s: dict[Size, deque[float]] = {}
        self._last_px: Size = (1, 1)
        self._decoding_s: dict[Size, deque[float]] = {}

    def note_step(self, size_px: Size, rows: int, seconds: float) -> None:
        """Note a denoising step of `rows` rows."""
        self._last_px = size_px
        self._note(self._row_step_s, size_px, seconds / rows)

    def note_decoding(self, size_px: Size, images: int, seconds: float) -> None:
        """Note the decoding of some images."""
        self._note(self._decoding_s, size_px, seconds / images)

    def steps_s(self, size_px: Size, row_steps: int) -> float:
        """Return the seconds of so many steps of one row, as its share of the batches it is in; 0 before the first step."""
        return row_steps * (self._of(self._row_step_s, size_px) or 0.0)

    def row_step_s(self) -> float:
        """Return the seconds of a step of one row of the size that was measured last; 0 before the first step."""
        return self._of(self._row_step_s, self._last_px) or 0.0

    def decoding_s(self, size_px: Size) -> float:
        """Return the seconds of decoding an image; 0 before the first was decoded."""
        return self._of(self._decoding_s, size_px) or 0.0

    def _note(self, measured: dict[Size, deque[float]], size_px: Size, seconds: float) -> None:
        with self._lock:
            measured.setdefault(size_px, deque(maxlen=_REMEMBERED)).append(seconds)

    def _of(self, measured: dict[Size, deque[float]], size_px: Size) -> float | None:
        with self._lock:
            if not measured:
                return None
            area = size_px[0] * size_px[1]
            nearest = min(measured, key=lambda size: abs(size[0] * size[1] - area))
            return median(measured[nearest]) * area / (nearest[0] * nearest[1])
