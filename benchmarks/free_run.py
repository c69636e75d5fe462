"""`selma generate` with engines that cost nothing, and what is watched while it runs."""

import os
import time
from collections import Counter
from pathlib import Path

import psutil

from selma_ray.progress import Progress
from selma_ray.run.recipe import Recipe, load_recipe

__all__ = ["SKILLS", "Watch", "free_recipe", "memory_mb"]

SKILLS = 5
_STEP = 1000
_DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"


def free_recipe(run_dir: str, images: int, per_prompt: int, batch: int) -> Recipe:
    """Return the demo's recipe for so many images of free engines."""
    per_skill = images // per_prompt // SKILLS
    return load_recipe(
        _DEMO,
        [
            f"run_dir={run_dir}", f"prompts.per_skill={per_skill}", "prompts.per_request=100",
            "prompts.requests_in_flight=8", f"prompts.max_requests={per_skill // 50 + 20}", "prompts.dev_fraction=0",
            "prompts.llm.engine=free", "prompts.llm.num_cpus=0.5", "images.engine=free", "images.num_cpus=0.5",
            f"images.per_prompt={per_prompt}", "images.selection=null", f"images.batch_size={batch}",
            "images.max_renderers=2", "images.min_renderers=2", "cluster.num_cpus=2",
        ],
    )  # fmt: skip


class Watch:
    """A report function that times the images and looks at memory on the way."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._times: dict[int, float] = {}
        self._started: tuple[int, float] | None = None
        self._ended = (0, 0.0)
        self.memory_mb: dict[str, Counter[str]] = {}

    def __call__(self, progress: Progress) -> None:
        """Take what a stage reports."""
        self._ended = progress.done, time.monotonic()
        self._times.setdefault(progress.done // _STEP, time.monotonic())
        if self._started is None and progress.done >= self._total // 10:
            self._started = self._ended
        if "quarter" not in self.memory_mb and progress.done >= self._total // 4:
            self.memory_mb["quarter"] = memory_mb()
        if "late" not in self.memory_mb and progress.done >= 9 * self._total // 10:
            self.memory_mb["late"] = memory_mb()

    def seconds_between(self, first: int, last: int) -> float:
        """Return the time from when so many images were finished until so many were, to the thousand."""
        return self._times[last // _STEP] - self._times[first // _STEP]

    @property
    def counted(self) -> int:
        """Return the images that the rate counts: those after the first tenth."""
        assert self._started is not None
        return self._ended[0] - self._started[0]

    @property
    def seconds(self) -> float:
        """Return the time that they took."""
        assert self._started is not None
        return self._ended[1] - self._started[1]


def _kind(process: psutil.Process) -> str:
    """Return what a process is; Ray adds the method that an actor runs at the moment."""
    return " ".join(process.cmdline()[:1]).rpartition("/")[2].partition(".submit")[0][:60]


def memory_mb() -> Counter[str]:
    """Return the memory that each kind of process of this run has for itself, in MB."""
    usage = Counter[str]()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name = "driver" if process.pid == os.getpid() else _kind(process)
            usage[name] += process.memory_full_info().uss / 1e6
        except psutil.Error:
            continue
    return usage
