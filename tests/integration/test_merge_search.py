"""The search of merge weights on the miniature: real renderers and judge, dev prompts of a run, stopped and gone on with."""

import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError
from selma_ray.run.stages import run_stage
from tests.integration.trained_run import trained_run

SEARCH = (
    "merging.method=search",
    "merging.search={generations: 1, candidates: 2, max_prompts: 4, by_block: true}",
)


@pytest.mark.heavy
def test_search_finds_weights_on_the_dev_prompts_and_goes_on(ray_cluster: Any, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", *SEARCH)
    told: list[Any] = []
    summary = run_stage(run, "merge", told.append)
    merged = tmp_path / "run" / "merged" / "merged"
    report = json.loads((merged / "report.json").read_text())
    candidates = report["search"]["candidates"]
    assert [candidate["number"] for candidate in candidates] == [0, 1, 2, 3, 4]
    assert all(0 <= candidate["score"] <= 1 for candidate in candidates)
    best = candidates[report["search"]["best"]]
    assert best["score"] == max(candidate["score"] for candidate in candidates)
    assert report["search"]["weights"] == best["weights"]
    assert set(best["weights"]) == {"down_blocks", "mid_block", "up_blocks"}
    assert summary["method"] == "search"
    assert (merged / "pipeline" / "model_index.json").is_file()
    assert [(event.done, event.total) for event in told] == [*((done, 5) for done in range(1, 6)), (0, 1), (1, 1)]

    record = tmp_path / "run" / "search" / "merged" / "search.json"
    scored = json.loads(record.read_text())
    scored["candidates"].pop()
    record.write_text(json.dumps(scored))
    run.folder.delete("done", "merge.json")
    told.clear()
    assert run_stage(run, "merge", told.append) == summary
    assert [(event.done, event.total) for event in told] == [(5, 5), (0, 1), (1, 1)]
    assert json.loads((merged / "report.json").read_text()) == report


def test_a_skill_without_dev_prompts_is_named(ray_cluster: Any, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", *SEARCH, "prompts.dev_fraction=0")
    with pytest.raises(ConfigError, match=r"merging.search needs dev prompts of every skill, common has none; raise"):
        run_stage(run, "merge", lambda progress: None)
