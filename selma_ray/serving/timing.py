"""How long denoising steps take, without making a card wait for the clock."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["StepTimer"]

_STEPS_AHEAD = 1  # steps that may be queued on a card behind the one in progress, so that it never idles between two


class StepTimer:
    """Measures steps; on a card by its own events, once it has reached them, which also keeps the host from running far ahead."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"
        self._queued: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    @contextmanager
    def timing(self, note: Callable[[float], None]) -> Iterator[None]:
        """Pass the seconds of the block to `note`: at its end, or, on a card, when a later block ends. What raises is not noted."""
        if not self._on_card:
            started_s = time.perf_counter()
            yield
            note(time.perf_counter() - started_s)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._queued.append((start, end, note))
        while len(self._queued) > _STEPS_AHEAD:
            start, end, note = self._queued.popleft()
            end.synchronize()
            note(start.elapsed_time(end) / 1000)
