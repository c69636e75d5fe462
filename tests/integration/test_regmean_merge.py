"""RegMean under Ray: a task an expert records what its modules are given on cached examples, once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selma_ray.errors import AdapterError
from selma_ray.experts.cache import encode_caches, skill_cache
from selma_ray.run.stages import run_stage
from tests.integration.trained_run import trained_run
from tests.unit.experts.rendered_images import write_images


def test_inputs_are_recorded_once_and_weigh_the_merge(ray_cluster: Any, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", "merging.method=regmean", "merging.regmean.examples=8", "experts.batch_size=4")
    for skill in run.skill_names:
        write_images(run.folder, skill, 4)
    caches = [skill_cache(run.folder, skill, run.recipe.model) for skill in run.skill_names]
    with pytest.raises(AdapterError, match="regmean needs the cached examples of common"):
        run_stage(run, "merge", lambda progress: None)
    encode_caches(run.folder, caches, run.recipe.model, run.recipe.experts, run.recipe.cluster)

    summary = run_stage(run, "merge", lambda progress: None)
    assert summary["method"] == "regmean"
    merged = load_file(tmp_path / "run" / "merged" / "merged" / "adapter" / "adapter_model.safetensors")
    for skill in run.skill_names:
        index = json.loads((tmp_path / "run" / "experts" / skill / "inputs.json").read_text())
        assert index["examples"] == 8
        grams = load_file(tmp_path / "run" / "experts" / skill / "inputs.safetensors")
        assert grams
        assert all(
            torch.linalg.eigvalsh(gram.double()).min() > -1e-3 * gram.diagonal().max() for gram in grams.values()
        )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "experts").rglob("inputs.*")}
    run.folder.delete("done", "merge.json")
    assert run_stage(run, "merge", lambda progress: None) == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "experts").rglob("inputs.*")} == before
    again = load_file(tmp_path / "run" / "merged" / "merged" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in merged)
