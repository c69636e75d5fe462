"""What comes after one round, on the miniature under Ray: a student that experts teach, and a round that the merge before it draws."""

import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.run.opening import open_run
from selma_ray.run.stages import run_stage
from tests.integration.trained_run import trained_run


def test_a_student_is_taught_by_the_experts_and_a_rerun_teaches_it_no_more(ray_cluster: Any, tmp_path: Path) -> None:
    run = trained_run(
        tmp_path / "run", "merging.method=distil", "images.sampling.steps=3",
        "merging.distil={steps: 3, prompts_per_skill: 1, states_per_image: 2, learning_rate: 1.0e-3}",
    )  # fmt: skip
    summary = run_stage(run, "merge", lambda progress: None)
    assert summary["method"] == "distil"
    merged = tmp_path / "run" / "merged" / "merged"
    assert (merged / "pipeline" / "model_index.json").is_file()
    [curve] = (tmp_path / "run" / "distil").glob("*/curve.json")
    losses = [point["loss"] for point in json.loads(curve.read_text())]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    assert not list(curve.parent.glob("state.safetensors"))

    student = curve.parent / "student" / "adapter_model.safetensors"
    before = student.stat().st_mtime_ns
    run.folder.delete("done", "merge.json")
    assert run_stage(run, "merge", lambda progress: None) == summary
    assert student.stat().st_mtime_ns == before


@pytest.mark.heavy  # Ray Train and a renderer start for the second round
def test_the_merge_draws_the_next_round_which_stands_alone(ray_cluster: Any, tmp_path: Path) -> None:
    run = trained_run(
        tmp_path / "run", "rounds=2", "images.sampling.steps=2", "images.max_renderers=1", "experts.steps=2", "experts.batch_size=4",
        "experts.lora.rank=2", "experts.lora.alpha=2",
    )  # fmt: skip
    summary = run_stage(run, "merge", lambda progress: None)
    assert [each["round"] for each in summary["rounds"]] == [1, 2]
    assert all(0 <= each["dev_dsg"] <= 1 for each in summary["rounds"])
    best = max(summary["rounds"], key=lambda each: each["dev_dsg"])
    assert summary["kept_round"] == best["round"]

    second = open_run(str(tmp_path / "run" / "rounds" / "2"))
    assert second.recipe.data.model.name == str(tmp_path / "run" / "merged" / "merged" / "pipeline")
    first, kept = (
        {path: each.folder.read_bytes(path) for path in each.folder.files("prompts")} for each in (run, second)
    )
    assert first
    assert kept == first
    before = {path: second.folder.local_path(path).stat().st_mtime_ns for path in second.folder.files()}
    run.folder.delete("done", "merge.json")
    assert run_stage(run, "merge", lambda progress: None) == summary
    assert {path: second.folder.local_path(path).stat().st_mtime_ns for path in second.folder.files()} == before
