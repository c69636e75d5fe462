"""Five experts at once against five one after another, on the miniature, with everything from start-up to export.

Run: python -m benchmarks.experts [key=value …], keys and defaults as in SETTINGS

At once, each expert has one core, and as many run together as there are cores. One after another, each has all cores. Both read the same
cache of encoded examples. All at once goes first, so files that are read twice are warm for the other way.
`parallel_over_sequential` is the ratio of the wall times (goal: at most 1.0).
"""

import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.drawn_run import draw_run
from selma_ray.cluster import ClusterConfig, connect, cpu_count
from selma_ray.experts.cache import encode_caches, skill_cache
from selma_ray.experts.config import ExpertsConfig, LoraSettings
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
    ways = {
        "at once, a core each": config,
        "one after another, all cores each": config.model_copy(
            update={"max_concurrent": 1, "cpus_per_worker": cpu_count()}
        ),
    }
    with tempfile.TemporaryDirectory() as path:
        drawn = draw_run(f"{path}/drawn", SKILLS, settings["images"])
        encode_caches(drawn, [skill_cache(drawn, skill, MODEL) for skill in SKILLS], MODEL, config, cluster)
        seconds = {
            name: _train(drawn, Path(path) / str(number), way) for number, (name, way) in enumerate(ways.items())
        }
    print_table(["five experts", "seconds"], [[name, f"{each:.0f}"] for name, each in seconds.items()])
    parallel_s, sequential_s = seconds.values()
    print_result({"parallel_over_sequential": round(parallel_s / sequential_s, 3)})


def _train(drawn: RunFolder, path: Path, config: ExpertsConfig) -> float:
    """Return the seconds that all experts take in a run folder of their own."""
    shutil.copytree(drawn.uri, path)
    started_s = time.perf_counter()
    train_experts(RunFolder(str(path)), plan_experts(SKILLS, config), MODEL, 0, ClusterConfig())
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
