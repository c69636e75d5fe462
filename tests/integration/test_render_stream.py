"""Rendering as Ray Data runs it: an engine that ends its process, and an engine that fails too often."""

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from PIL import Image
from ray import cloudpickle

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import RenderError
from selma_ray.images.config import ImageChoiceConfig, ImagesConfig
from selma_ray.images.stream import follow, image_summary, read_images, render_stream
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import PROMPT_SCHEMA
from selma_ray.storage import RunFolder

IMAGES = ImagesConfig(
    engine="free",
    batch_size=4,
    num_cpus=0.5,
    sampling=SamplingConfig(width_px=64, height_px=64),
    max_failed_fraction=0.2,
)

# Ray's workers cannot import this file: what it defines goes to them by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_cluster")


class EndingEngine:
    """Ends its process at a prompt with the word ghost, as a fault in native code would, and refuses a goblin."""

    scheduler = "none"

    def __init__(self, *_: Any) -> None:
        pass

    def render(self, prompts: Any, seeds: Any, size_px: Any = None) -> Any:
        if any("ghost" in prompt for prompt in prompts):
            os._exit(1)
        if any("goblin" in prompt for prompt in prompts):
            raise ValueError("cannot draw a goblin")
        return [Image.new("RGB", (64, 64), (seed % 256, 0, 0)) for seed in seeds]


def prompts(*texts: str) -> Any:
    rows = [{"id": text, "skill": "one", "index": i, "prompt": text, "split": "train"} for i, text in enumerate(texts)]
    table = pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)
    return ray.data.from_arrow([table.slice(start, 5) for start in range(0, len(rows), 5)])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def render(folder: RunFolder, tiny_pipeline_dir: Path) -> Any:
    """Return a function that streams prompts through an engine and returns the last progress."""
    model = ModelConfig(name=str(tiny_pipeline_dir))

    def run(texts: Any, config: Any = IMAGES, **options: Any) -> Any:
        images = render_stream(prompts(*texts), config, model, 0, folder, ClusterConfig(), **options)
        return list(follow(images, folder, config, len(texts) * config.per_prompt))[-1][1]

    return run


@pytest.mark.heavy
def test_a_prompt_that_ends_the_renderer_is_recorded_and_the_others_are_rendered(
    render: Any, folder: RunFolder
) -> None:
    texts = [f"cat {number}" for number in range(11)]
    progress = render([*texts[:6], "a ghost", *texts[6:]], open_engine=EndingEngine)
    assert sorted(read_images(folder, "one")["prompt"].to_pylist()) == sorted(texts)
    summary = image_summary(folder, ["one"])
    assert (summary["rendered"], summary["failed"]) == (11, 1)
    assert list(summary["reasons"]) == [
        "RuntimeError: the renderer's process ended 3 times while it rendered this row alone"
    ]
    assert progress.again >= IMAGES.batch_size  # the ghost's batch, and those that were in flight beside it
    assert folder.files("in_flight") == [path for path in folder.files("in_flight") if "row-" in path]


def test_too_many_failures_end_the_stream(render: Any, folder: RunFolder) -> None:
    texts = [f"goblin {number}" if number % 2 else f"cat {number}" for number in range(40)]
    with pytest.raises(RenderError, match=r"max_failed_fraction allows 0.2, 9 of 40 images failed \(9 x ValueError"):
        render(texts, open_engine=EndingEngine)


def test_the_best_of_each_prompt_is_kept_whatever_the_blocks(render: Any, folder: RunFolder) -> None:
    config = IMAGES.model_copy(update={"per_prompt": 3, "batch_size": 7, "selection": ImageChoiceConfig()})
    render([f"cat {number}" for number in range(12)], config, open_scorer=lambda: score_by_redness)
    images = read_images(folder, "one").to_pylist()
    assert len(images) == 36
    for number in range(12):
        group = [row for row in images if row["prompt"] == f"cat {number}"]
        assert len(group) == 3
        best = max(group, key=lambda row: row["score"])
        assert [row["id"] for row in group if row["split"] == "train"] == [best["id"]]


def score_by_redness(images: Any, prompts: Any) -> Any:
    return [image.getpixel((0, 0))[0] / 255 for image in images]
