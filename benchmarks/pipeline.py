"""The whole of `selma generate` with engines that cost nothing: what Ray, Arrow, PNG and storage cost, and whether memory grows.

The rate counts from a tenth of the images on, when all is started; memory is what the processes have for themselves (the
object store is not counted), from a quarter of the images to nine tenths, before the pools shrink.

Run: python -m benchmarks.pipeline [images=200000] [per_prompt=10] [batch=256]
"""

import tempfile

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.free_run import Watch, free_recipe
from selma_ray.run.opening import open_run
from selma_ray.run.stages import run_stage


def main() -> None:
    """Run it once, print a table for people and one JSON line."""
    options = read_settings({"images": 200_000, "per_prompt": 10, "batch": 256})
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        recipe = free_recipe(f"{folder}/run", options["images"], options["per_prompt"], options["batch"])
        watch = Watch(options["images"])
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


if __name__ == "__main__":
    main()
