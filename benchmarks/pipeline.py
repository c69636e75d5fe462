"""The whole of `selma generate` with engines that cost nothing: what Ray, Arrow, PNG and storage cost, and whether memory grows.

The rate counts from a tenth of the images on, when all is started; memory is what the processes have for themselves (the
object store is not counted), from a quarter of the images to nine tenths, before the pools shrink.

Run: python -m benchmarks.pipeline [images=200000] [per_prompt=10] [batch=256]
"""

import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from benchmarks.common import machine, print_result, print_table, read_settings
from selma_ray.progress import Progress
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from selma_ray.run.stages import run_stage

DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
SKILLS = 5


def main() -> None:
    """Run it once, print a table for people and one JSON line."""
    options = read_settings({"images": 200_000, "per_prompt": 10, "batch": 256})
    print(machine())
    per_skill = options["images"] // options["per_prompt"] // SKILLS
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            DEMO,
            [
                f"run_dir={folder}/run", f"prompts.per_skill={per_skill}", "prompts.per_request=100",
                "prompts.requests_in_flight=8", f"prompts.max_requests={per_skill // 50 + 20}", "prompts.dev_fraction=0",
                "prompts.llm.engine=free", "prompts.llm.num_cpus=0.5", "images.engine=free", "images.num_cpus=0.5",
                f"images.per_prompt={options['per_prompt']}", "images.selection=null", f"images.batch_size={options['batch']}",
                "images.max_renderers=2", "images.min_renderers=2", "cluster.num_cpus=2",
            ],
        )  # fmt: skip
        watch = _Watch(per_skill * SKILLS * options["per_prompt"])
        run_stage(open_run(recipe), "generate", watch)
    names = watch.memory_mb["late"].keys() | watch.memory_mb["quarter"].keys()
    print_table(
        ("process", "MB at a quarter", "MB at nine tenths"),
        [
            (name, round(watch.memory_mb["quarter"][name]), round(watch.memory_mb["late"][name]))
            for name in sorted(names)
        ],
    )
    rate = watch.counted / watch.seconds
    print(f"\n{watch.counted} images in {watch.seconds:.1f} s")
    rss_growth = sum(watch.memory_mb["late"].values()) - sum(watch.memory_mb["quarter"].values())
    print_result({"images_per_s": round(rate), "rss_growth_mb": round(rss_growth), **options})


class _Watch:
    """A report function that times the images and looks at memory on the way."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started: tuple[int, float] | None = None
        self._ended = (0, 0.0)
        self.memory_mb: dict[str, Counter[str]] = {}

    def __call__(self, progress: Progress) -> None:
        self._ended = progress.done, time.monotonic()
        if self._started is None and progress.done >= self._total // 10:
            self._started = self._ended
        if "quarter" not in self.memory_mb and progress.done >= self._total // 4:
            self.memory_mb["quarter"] = _memory_mb()
        if "late" not in self.memory_mb and progress.done >= 9 * self._total // 10:
            self.memory_mb["late"] = _memory_mb()

    @property
    def counted(self) -> int:
        assert self._started is not None
        return self._ended[0] - self._started[0]

    @property
    def seconds(self) -> float:
        assert self._started is not None
        return self._ended[1] - self._started[1]


def _kind(process: psutil.Process) -> str:
    """Return what a process is; Ray adds the method that an actor runs at the moment."""
    return " ".join(process.cmdline()[:1]).rpartition("/")[2].partition(".submit")[0][:60]


def _memory_mb() -> Counter[str]:
    """Return the memory that each kind of process of this run has for itself, in MB."""
    usage = Counter[str]()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name = "driver" if process.pid == os.getpid() else _kind(process)
            usage[name] += process.memory_full_info().uss / 1e6
        except psutil.Error:
            continue
    return usage


if __name__ == "__main__":
    main()
