"""Five experts at once, one after another and as one, on the miniature, with everything from start-up to export.

Run: python -m benchmarks.experts [key=value …], keys and defaults as in SETTINGS

At once, each expert has one core, and as many run together as there are cores; the others take turns in their processes. One after
another, each has all cores and a start of its own. Both read the same cache of encoded examples. All at once goes first, so files that are
read twice are warm for the other way.
`parallel_over_sequential` is the ratio of the wall times (goal: at most 1.0). `fused_over_parallel` is that of all five in one process
with one forward pass, which has all cores, over five processes (goal: at most 0.7).
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.drawn_run import draw_run
from selma_ray.adapters.config import LoraSettings
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect, cpu_count
from selma_ray.experts.cache import encode_caches, skill_cache
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.launch import plan_experts, train_experts
from selma_ray.miniature.skills import SKILLS
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder

SETTINGS = {"steps": 25, "batch_size": 16, "rank": 16, "images": 32}
MODEL = ModelConfig()


def main() -> None:
    """Measure both ways, then print a table and one JSON line."""
    settings = read_settings(SETTINGS)
    print(machine(), settings)
    cluster = ClusterConfig()
    connect(cluster)
    config = ExpertsConfig(
        lora=LoraSettings(rank=settings["rank"], alpha=settings["rank"]),
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=5e-4,
        checkpoint_every_steps=settings["steps"],
    )
    with tempfile.TemporaryDirectory() as path:
        drawn = draw_run(f"{path}/drawn", SKILLS, settings["images"])
        encode_caches(drawn, [skill_cache(drawn, skill, MODEL) for skill in SKILLS], MODEL, config, cluster)
        parallel_s = _train(drawn, Path(path) / "at_once", [SKILLS], config)
        all_cores = config.model_copy(update={"cpus_per_worker": cpu_count()})
        fused_s = _train(drawn, Path(path) / "as_one", [SKILLS], all_cores.model_copy(update={"fused": True}))
        sequential_s = _train(drawn, Path(path) / "in_turn", [[skill] for skill in SKILLS], all_cores)
    print_table(
        ["five experts", "seconds"],
        [
            ["at once, a core each", f"{parallel_s:.0f}"],
            ["one after another, all cores each", f"{sequential_s:.0f}"],
            ["as one, all cores", f"{fused_s:.0f}"],
        ],
    )
    print_result(
        {
            "parallel_over_sequential": round(parallel_s / sequential_s, 3),
            "fused_over_parallel": round(fused_s / parallel_s, 3),
        }
    )


def _train(drawn: RunFolder, path: Path, starts: Sequence[Sequence[str]], config: ExpertsConfig) -> float:
    """Return the seconds that the skills of all starts take in a run folder of their own."""
    shutil.copytree(drawn.uri, path)
    started_s = time.perf_counter()
    for skills in starts:
        train_experts(RunFolder(str(path)), plan_experts(skills, config), MODEL, 0, ClusterConfig())
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
