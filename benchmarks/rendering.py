"""Rendering through Ray Data against a bare batched diffusers loop: images per second, start-up excluded.

Both use the miniature, one process that renders, the same threads, batch, steps and guidance, and both end in PNG: the loop
saves files, the stream writes its shards. They take turns; medians are compared.

Run: python -m benchmarks.rendering [images=160] [steps=10] [rounds=3]
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from benchmarks.common import machine, print_result, print_table, read_settings
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.images.config import ImagesConfig
from selma_ray.images.stream import render_stream
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.prompts.free import invent_caption
from selma_ray.records import PROMPT_SCHEMA, seed_of
from selma_ray.storage import RunFolder

__all__ = ["bare_seconds", "captions", "load_bare"]

BATCH = 16
WARM_UP_BATCHES = 4
MODEL = ModelConfig(name="miniature")


def main() -> None:
    """Take turns, print a table for people and one JSON line."""
    options = read_settings({"images": 160, "steps": 10, "rounds": 3})
    print(machine())
    sampling = SamplingConfig(steps=options["steps"], guidance_scale=4.0, width_px=64, height_px=64)
    prompts = captions(options["images"])
    connect(ClusterConfig(num_cpus=2))
    pipeline = load_bare()
    bare_seconds(pipeline, prompts[:BATCH], sampling, BATCH)
    rates: dict[str, list[float]] = {"bare loop": [], "Ray Data": []}
    for _ in range(options["rounds"]):
        rates["bare loop"].append(len(prompts) / bare_seconds(pipeline, prompts, sampling, BATCH))
        rates["Ray Data"].append(_streamed_rate(prompts, sampling))
        print(", ".join(f"{name} {values[-1]:.2f} images/s" for name, values in rates.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print_table(
        ("way", "images/s, median", "each round"),
        [
            (name, f"{medians[name]:.2f}", ", ".join(f"{value:.2f}" for value in values))
            for name, values in rates.items()
        ],
    )
    print_result({"of_bare_loop": round(medians["Ray Data"] / medians["bare loop"], 3), **options})


def captions(count: int) -> list[str]:
    """Return invented prompts."""
    import random

    rng = random.Random(0)
    return [invent_caption(rng) for _ in range(count)]


def load_bare(threads: int = 1) -> Any:
    """Load the pipeline as a script would, for so many threads."""
    import torch

    from selma_ray.models.rendering import load_pipeline

    torch.set_num_threads(threads)
    return load_pipeline(MODEL, "cpu")


def bare_seconds(pipeline: Any, prompts: list[str], sampling: SamplingConfig, batch: int) -> float:
    """Render and save `prompts`, `batch` a call; returns the seconds it took."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        for start in range(0, len(prompts), batch):
            images = pipeline(
                prompt=prompts[start : start + batch],
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                width=sampling.width_px,
                height=sampling.height_px,
                generator=[
                    torch.Generator().manual_seed(index) for index in range(start, min(start + batch, len(prompts)))
                ],
            ).images
            for index, image in enumerate(images, start):
                image.save(Path(folder) / f"{index}.png")
        return time.monotonic() - started_s


def _streamed_rate(prompts: list[str], sampling: SamplingConfig) -> float:
    """Return images per second of the stream, from its warm-up to its last batch.

    The first batches wait for actors of later stages to start, and would come in a burst.
    """
    rows = [
        {"id": text, "skill": "one", "index": index, "prompt": text, "split": "train"}
        for index, text in enumerate(prompts)
    ]
    table = pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)
    blocks = ray.data.from_arrow([table.slice(start, BATCH) for start in range(0, len(rows), BATCH)])
    config = ImagesConfig(sampling=sampling, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        stream = render_stream(blocks, config, MODEL, seed_of(0), RunFolder(folder), ClusterConfig())
        times_s = [time.monotonic() for _ in stream.iter_rows()]
    warm = WARM_UP_BATCHES * BATCH
    return (len(times_s) - warm) / (times_s[-1] - times_s[warm - 1])


if __name__ == "__main__":
    main()
