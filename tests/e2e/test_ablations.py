"""SELMA's ablations by recipe: ground truth, one LoRA on the mixed data, and the choice of checkpoint, in one run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selma_ray.models.locate import locate_text_to_image
from tests.e2e.conftest import DEMO, SMALL


@pytest.mark.heavy
def test_ground_truth_mixed_lora_and_choice_of_checkpoint(selma: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        f"run_dir={run_dir}",
        *SMALL,
        "data.prompts=ground_truth",
        "data.images=ground_truth",
        "images.per_prompt=1",
        "images.selection=null",
        "experts.selection={every_steps: 3, max_prompts: 1}",
        "experts.mixed={ranks: [8]}",
    ]
    for command in ("generate", "train", "merge", "evaluate"):
        finished = selma(command, *overrides)
        assert finished.returncode == 0, finished.stderr
    assert set(json.loads((run_dir / "done" / "evaluate.json").read_text())["models"]) == {
        "base", "common", "counting", "mixed-r8", "merged"
    }  # fmt: skip
    for name in ("common", "counting", "mixed-r8"):
        result = json.loads((run_dir / "experts" / name / "result.json").read_text())
        scores = json.loads((run_dir / "experts" / name / "dev_scores.json").read_text())
        assert [score["step"] for score in scores] == [3, 6]
        assert result["dev_dsg"] == max(score["dsg"] for score in scores)
        assert any((run_dir / "experts" / name / "tensorboard").iterdir())
    adapter = json.loads((run_dir / "experts" / "mixed-r8" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (8, "miniature")
    assert adapter["revision"]


STUDY = """
recipe: RECIPE
seeds: [0]
guidance_scales: [1.0]
max_prompts: 4
arms:
  selma: {title: SELMA, models: [experts, mixed, merged], changes: {experts.mixed: {ranks: [4]}}}
  factors: {title: mean of factors, changes: {merging.method: average_factors}}
  dpo: {title: DPO, changes: {experts.dpo: {beta: 2000}}}
  moe: {title: MoE-LoRA, models: [moe], changes: {experts.moe: {learning_rate: 0.01}}}
  weak: {title: images of another model, changes: {data.model.name: OTHER}}
"""


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_a_study_makes_each_thing_once_and_writes_one_table(selma: Any, tmp_path: Path) -> None:
    shutil.copytree(locate_text_to_image("miniature").path, tmp_path / "other")
    study_text = STUDY.replace("OTHER", str(tmp_path / "other")).replace("RECIPE", str(DEMO))
    (tmp_path / "study.yaml").write_text(study_text)
    overrides = [f"run_dir={tmp_path / 'run'}", *SMALL, "data.prompts=ground_truth"]
    finished = selma("study", *overrides, recipe=tmp_path / "study.yaml")
    assert finished.returncode == 0, finished.stderr
    study = tmp_path / "run" / "study"
    models = set(json.loads((study / "scores/seed=0/guidance=1/done/scores.json").read_text())["models"])
    assert models == {
        "base", "selma.common", "selma.counting", "selma.mixed-r4", "selma.merged", "factors.merged", "dpo.merged",
        "moe.moe", "weak.merged",
    }  # fmt: skip
    table = (study / "tables.md").read_text()
    assert all(f"| {title} |" in table for title in ("SELMA", "DPO", "MoE-LoRA", "images of another model"))
    assert [path.read_bytes()[:4] for path in study.glob("pictures-guidance=*.png")] == [b"\x89PNG"]

    def file_of(arm: str, *parts: str) -> Any:
        return study.joinpath(arm, "seed=0", *parts)

    adapter = ("experts", "counting", "adapter_model.safetensors")
    for arm in ("factors", "moe"):
        assert file_of(arm, *adapter).samefile(file_of("selma", *adapter))
    assert not file_of("dpo", *adapter).samefile(file_of("selma", *adapter))
    shared = next(file_of("selma", "images").rglob("*.parquet"))
    assert shared.samefile(file_of("dpo", "images", *shared.parts[-2:]))
    curve = json.loads(file_of("dpo", "experts", "counting", "curve.json").read_text())
    assert [set(row) for row in curve] == [{"step", "loss", "learning_rate", "preferred"}] * 6
    assert not file_of("weak", "experts", "mixed-r4").exists()
    assert finished.stderr.count("Traceback") == 0
    again = selma("study", *overrides, recipe=tmp_path / "study.yaml")
    assert again.returncode == 0, again.stderr
