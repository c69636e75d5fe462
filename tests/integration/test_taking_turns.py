"""Prompts and images where the cluster cannot hold both pools at once: one after the other, with the rows of both at once."""

import gc
from pathlib import Path

import pytest

from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from selma_ray.run.stages import run_stage

pytestmark = pytest.mark.usefixtures("ray_cluster")

DEMO = Path(__file__).parents[2] / "jobs" / "recipes" / "demo.yaml"
FREE = [
    "prompts.llm.engine=free",
    "images.engine=free",
    "images.selection=null",
    "images.max_renderers=1",
    "prompts.per_skill=12",
]


def generated(folder: Path, *overrides: str) -> tuple[dict[str, bytes], list[str]]:
    """Return the images of a run by id, and what was told of its progress."""
    run = open_run(load_recipe(DEMO, [f"run_dir={folder}", *FREE, *overrides]))
    told = []
    run_stage(run, "generate", lambda progress: told.append("; ".join(progress.figures)))
    paths = run.folder.files("images", suffix=".parquet")
    rows = run.folder.read_table(paths, columns=["id", "image"]).to_pylist()
    return {row["id"]: row["image"]["bytes"] for row in rows}, told


def test_pools_that_do_not_fit_together_take_turns_and_give_the_same_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at_once, told = generated(tmp_path / "at_once")
    assert len(at_once) == 5 * 11 * 2
    assert not any("gone" in words for words in told)
    gc.disable()  # a large process collects rarely: the language model must go all the same
    try:
        in_turn, told = generated(tmp_path / "in_turn", "prompts.llm.num_cpus=3", "images.num_cpus=3")
    finally:
        gc.enable()
    assert in_turn == at_once
    assert "they run one after the other" in caplog.text
    assert any("renderers start when the language model is done and gone" in words for words in told)
