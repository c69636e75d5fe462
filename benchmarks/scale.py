"""A million images with engines that cost nothing: what a run of that size takes to write, to start again, to look at, and to train on.

The examples that training opens are empty tensors under the ids of the run's images: encoding a million images is a matter of GPUs.
Growth compares the time of an image over the whole run with that of its first ten thousand, after a start of as many.

Run: python -m benchmarks.scale [images=1000000] [per_prompt=10] [batch=256]
"""

import json
import tempfile
import time
from collections.abc import Callable

import ray
import torch
from safetensors.torch import save

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.free_run import Watch, free_recipe, memory_mb
from selma_ray.cli.data import status_of
from selma_ray.experts.cache import SkillCache, skill_cache
from selma_ray.experts.examples import EncodedExamples
from selma_ray.models.config import ModelConfig
from selma_ray.progress import Progress
from selma_ray.run.opening import Run, open_run
from selma_ray.run.stages import run_stage
from selma_ray.storage import RunFolder

_GROWTH_OVER = 10_000


def main() -> None:
    """Run it once, print a table for people and one JSON line."""
    options = read_settings({"images": 1_000_000, "per_prompt": 10, "batch": 256})
    images = options["images"]
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(free_recipe(f"{folder}/run", images, options["per_prompt"], options["batch"]))
        watch = Watch(images)
        generate_s = _seconds(lambda: run_stage(run, "generate", watch))
        by_process = watch.memory_mb["late"]
        run.folder.delete("done", "generate.json")
        restart_s = _seconds(lambda: run_stage(run, "generate", _quiet))
        by_process["driver after a restart"] = memory_mb()["driver"]
        ray.shutdown()
        status_s = _seconds(lambda: status_of(run))
        caches: list[SkillCache] = []
        cache_s = _seconds(lambda: caches.extend(_cache_of(run, skill) for skill in run.skill_names))
        for cache in caches:
            _write_empty(run.folder, cache)
        directories = [cache.directory for cache in caches]
        before_mb = memory_mb()["driver"]
        training_start_s = _seconds(lambda: EncodedExamples(run.folder, directories).batch(range(8)))
        by_process["trainer, for its examples"] = memory_mb()["driver"] - before_mb
        sizes = [file.size_bytes for path, file in run.folder.listing("images").items() if path.endswith(".parquet")]
        requests = len(run.folder.files("prompts"))
    first_s = watch.seconds_between(_GROWTH_OVER, 2 * _GROWTH_OVER) / _GROWTH_OVER
    all_s = watch.seconds_between(_GROWTH_OVER, images) / (images - _GROWTH_OVER)
    times = {
        "generate": generate_s, "generate again, nothing missing": restart_s, "selma data status": status_s,
        "which examples to encode": cache_s, "a trainer's first batch": training_start_s,
    }  # fmt: skip
    print(f"\n{images} images in {len(sizes)} files of {sum(sizes) / 1e9:.1f} GB, {requests} files of requests")
    print_table(("what", "seconds"), [(name, round(seconds, 1)) for name, seconds in times.items()])
    print_table(("process", "MB for itself"), [(name, round(mb)) for name, mb in sorted(by_process.items())])
    print_result(
        {
            "images_per_s": round(1 / all_s),
            "time_growth_10k_to_1m": round(all_s / first_s, 2),
            "restart_s": round(restart_s, 1),
            "status_s": round(status_s, 1),
            "training_start_s": round(cache_s + training_start_s, 1),
            "rss_mb": {name: round(mb) for name, mb in sorted(by_process.items())},
            "shards": len(sizes),
            **options,
        }
    )


def _cache_of(run: Run, skill: str) -> SkillCache:
    return skill_cache(run.folder, skill, ModelConfig())


def _write_empty(folder: RunFolder, cache: SkillCache) -> None:
    """Write a cache whose examples hold one number each."""
    for item in cache.items:
        ids = folder.row_groups(item["source"], ["id"])[item["row_group"]]["id"].to_pylist()
        content = save({"latent_mean": torch.zeros(len(ids), 1)}, metadata={"ids": json.dumps(ids)})
        folder.write_bytes(content, item["shard"])
    cache.write_index(folder)


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


def _quiet(progress: Progress) -> None:
    """Show nothing."""


if __name__ == "__main__":
    main()
