"""Prompts and images as one stream: against its slower stage alone, and against the reference's way.

`of_slower_stage`: the stand-in engines wait as GPUs would; the stream's time, from the first answer to the last image, over that
of its slower stage alone: prompts from the first answer to the last, images from the start of the first batch to the last image. In
sequence, the two stages would take the sum.

`over_reference`: real engines, vLLM and the miniature, at 20 steps; the time of a prompt and its image in the reference's way (one
prompt a request, one request at a time, then one image a call with all cores) over ours (many prompts a request, requests and
images in batches, both at once, each with a core). vLLM has one core in both: with both of two it took 18 s a prompt, which would
flatter the ratio. Engines are loaded in both before the clock starts.

Run: python -m benchmarks.stream [waiting|reference]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import machine, print_result, print_table
from benchmarks.rendering import bare_seconds, captions, load_bare
from selma_ray.run.opening import Run, open_run
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.run.stages import run_stage
from selma_ray.storage import RunFolder

CORES = 2
DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"
ONE_IMAGE = ["images.per_prompt=1", "images.selection=null"]
WAITING = [
    "skills=[miniature/common, miniature/counting]", "prompts.per_skill=120", "prompts.dev_fraction=0",
    "prompts.per_request=5", "prompts.llm.engine=free", "prompts.llm.free.latency_s=1.2", "images.engine=free",
    "images.free.latency_s=1.2", "images.batch_size=4", "images.max_renderers=1", *ONE_IMAGE, "cluster.num_cpus=2",
]  # fmt: skip
# The more prompts are kept, the more are rejected: both ways keep as many, of one skill.
REAL = [
    "skills=[miniature/common]", "prompts.per_skill=64", "prompts.dev_fraction=0", "prompts.max_requests=400",
    f"cluster.num_cpus={CORES}", *ONE_IMAGE,
]  # fmt: skip
OURS = [*REAL, "prompts.requests_in_flight=8"]
REFERENCE = [*REAL, "prompts.per_request=1", "prompts.requests_in_flight=1"]
REFERENCE_IMAGES = 8
FIRST_BATCH_WITHIN_S = 300


def main() -> None:
    """Measure, print tables for people and one JSON line."""
    print(machine())
    wanted = sys.argv[1:] or ["waiting", "reference"]
    result: dict[str, float] = {}
    if "waiting" in wanted:
        result |= _against_slower_stage()
    if "reference" in wanted:
        result |= _against_reference()
    print_result(result)


def _against_slower_stage() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        alone = _run(WAITING, f"{folder}/alone", _prompts_alone)
        prompts_s = _span(_times(alone, "prompts"))
        with ThreadPoolExecutor(1) as watcher:
            first_batch = watcher.submit(_first_batch, alone)
            images = _times(_run(WAITING, f"{folder}/alone", _generate), "images")
            images_s = max(images) - first_batch.result()
        together = _run(WAITING, f"{folder}/stream", _generate)
        stream_s = max(_times(together, "images")) - min(_times(together, "prompts"))
    ratio = stream_s / max(prompts_s, images_s)
    rows = [
        ("prompts alone", prompts_s),
        ("images alone", images_s),
        ("one after the other", prompts_s + images_s),
        ("stream", stream_s),
    ]
    print_table(("waiting engines", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in rows])
    return {"of_slower_stage": round(ratio, 3)}


def _first_batch(run: Run) -> float:
    """Wait for a run's first batch of images and return when it was begun; its images are written with later ones."""
    deadline_s = time.monotonic() + FIRST_BATCH_WITHIN_S
    while time.monotonic() < deadline_s:
        if begun := _times(run, "in_flight"):
            return min(begun)
        time.sleep(0.05)
    raise TimeoutError(f"no batch of images was begun within {FIRST_BATCH_WITHIN_S} s")


def _against_reference() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        ours = _run(OURS, f"{folder}/ours", _generate)
        images = _times(ours, "images")
        our_s = (max(images) - min(_times(ours, "prompts"))) / _kept_later(ours)
        reference = _run(REFERENCE, f"{folder}/reference", _prompts_alone)
        prompt_s = _span(_times(reference, "prompts")) / _kept_later(reference)
        sampling = reference.recipe.images.sampling
    pipeline = load_bare(CORES)
    bare_seconds(pipeline, captions(1), sampling, 1)
    image_s = bare_seconds(pipeline, captions(REFERENCE_IMAGES), sampling, 1) / REFERENCE_IMAGES
    rows = [
        ("reference: a prompt", prompt_s),
        ("reference: an image", image_s),
        ("reference: both", prompt_s + image_s),
        ("stream: both", our_s),
    ]
    print_table(("real engines", "seconds for each"), [(name, f"{seconds:.2f}") for name, seconds in rows])
    return {"over_reference": round((prompt_s + image_s) / our_s, 2)}


def _run(overrides: list[str], run_dir: str, stage: Callable[[Run], object]) -> Run:
    run = open_run(load_recipe(DEMO, [f"run_dir={run_dir}", *overrides]))
    stage(run)
    return run


def _generate(run: Run) -> None:
    run_stage(run, "generate", lambda progress: None)


def _prompts_alone(run: Run) -> None:
    from selma_ray.cluster.connection import connect
    from selma_ray.prompts.stream import prompt_stream

    recipe: Recipe = run.recipe
    connect(recipe.cluster)
    prompt_stream(run.skills, recipe.prompts, recipe.seed, run.folder, recipe.cluster).materialize()


def _kept_later(run: Run) -> int:
    """Return how many prompts came after the first answer, whose own time is before the clock starts."""
    from selma_ray.prompts.store import read_decided

    (skill,) = run.skill_names
    first = read_decided(run.folder, skill, 0) or []
    return run.recipe.prompts.per_skill - sum(candidate.kept for candidate in first)


def _times(run: Run, what: str) -> list[float]:
    """Return when each file of a stage was written."""
    folder: RunFolder = run.folder
    suffix = ".parquet" if what == "images" else ".json"
    return [folder.local_path(path).stat().st_mtime for path in folder.files(what, suffix=suffix)]


def _span(times: list[float]) -> float:
    return max(times) - min(times)


if __name__ == "__main__":
    main()
