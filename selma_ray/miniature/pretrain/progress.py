"""What every training here shares: a budget in hours or steps, a learning-rate curve over it, and atomic checkpoints."""

import ctypes
import logging
import math
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Budget", "Meter", "load_checkpoint", "prepare_process", "save_checkpoint", "train_precision"]

logger = logging.getLogger(__name__)


class Budget:
    """Counts a training's steps and seconds, over restarts too, against its limit in hours or steps."""

    def __init__(self, hours: float | None, steps: int | None, *, warmup_steps: int = 200, decay: float = 0.3) -> None:
        if hours is None and steps is None:
            raise ValueError("a training needs --hours or --steps")
        self.limit_s = math.inf if hours is None else hours * 3600
        self.limit_steps = steps
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.step = 0
        self.spent_s = 0.0
        self._resumed_at = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self.spent_s + time.monotonic() - self._resumed_at

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        by_steps = self.step / self.limit_steps if self.limit_steps else 0.0
        return min(1.0, max(by_steps, self.elapsed_s / self.limit_s))

    @property
    def rate(self) -> float:
        """Factor on the learning rate: a warm-up, a plateau, then a cosine to zero over the last `decay` of the budget."""
        warm = min(1.0, (self.step + 1) / self.warmup_steps)
        late = max(0.0, self.progress - (1 - self.decay)) / self.decay
        return warm * (0.5 + 0.5 * math.cos(math.pi * late)) + 1e-3

    def set_rate(self, optimizer: torch.optim.Optimizer, peak: float) -> None:
        """Set an optimizer's learning rate for the coming step."""
        for group in optimizer.param_groups:
            group["lr"] = peak * self.rate

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the budget."""
        return {"step": self.step, "spent_s": self.elapsed_s}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        self.step, self.spent_s = state["step"], state["spent_s"]
        self._resumed_at = time.monotonic()


class Meter:
    """Averages a training's losses and logs them every `every_s` seconds."""

    def __init__(self, name: str, budget: Budget, *, every_s: float = 30.0) -> None:
        self.name, self.budget, self.every_s = name, budget, every_s
        self._start()

    def _start(self) -> None:
        self._since, self._samples, self._count = time.monotonic(), 0, 0
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, num_samples: int, **values: float) -> None:
        """Count a step; log and start over when it is time."""
        self._samples += num_samples
        self._count += 1
        for key, value in values.items():
            self._sums[key] += value
        elapsed = time.monotonic() - self._since
        if elapsed < self.every_s:
            return
        means = " ".join(f"{key} {total / self._count:.4f}" for key, total in self._sums.items())
        logger.info(
            "%s: step %d, %.0f%%, %.1f samples/s, %s",
            self.name,
            self.budget.step,
            100 * self.budget.progress,
            self._samples / elapsed,
            means,
        )
        self._start()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None when there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def train_precision(device: str) -> ExitStack:
    """Open the contexts of a forward pass in training: bf16, and on a CPU plain attention.

    The fused attention's backward pass multiplies one small matrix at a time on a CPU, which costs up to four fifths of a
    step with short sequences.
    """
    contexts = ExitStack()
    contexts.enter_context(torch.autocast(device, torch.bfloat16))
    if device == "cpu":
        contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
    return contexts


def prepare_process(threads: int, seed: int) -> None:
    """Set up a training process: logging, memory, threads and the seed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def _keep_freed_memory() -> None:
    """Stop glibc from returning memory to the kernel: page faults on fresh tensors cost up to half of a step on a CPU."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**28)
