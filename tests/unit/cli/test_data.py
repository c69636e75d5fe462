import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selma_ray.cli import commands as cli
from selma_ray.images.in_flight import begin_batch
from selma_ray.images.progress import follow
from selma_ray.images.shards import write_candidates, write_shards
from selma_ray.prompts.progress import PromptProgress, write_prompt_progress
from selma_ray.prompts.store import PromptCandidate, write_decided
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from selma_ray.storage import RunFolder
from tests.unit.images.test_progress import Stream
from tests.unit.images.test_shards import row, table

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"


@pytest.fixture
def run_dir(tmp_path: Path, tiny_pipeline_dir: Path) -> str:
    """Return the folder of a run that stopped after some prompts and images."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    names = [f"model.name={tiny_pipeline_dir}", f"prompts.llm.name={tmp_path / 'llm'}", f"run_dir={tmp_path / 'run'}"]
    run = open_run(load_recipe(DEMO, [*names, "skills=[miniature/common, miniature/counting]"]))
    candidates = [PromptCandidate("a red apple", index=0, split="train"), PromptCandidate("a", "too similar")]
    write_decided(run.folder, "common", 0, candidates)
    write_shards(run.folder, table(row("a", "common"), row("b", "counting", error="ValueError: no")))
    begin_batch(run.folder, ["lost"])
    list(follow(Stream(None, "ValueError: no"), run.folder, run.recipe.images, total=100))
    now = time.time()
    write_prompt_progress(run.folder, PromptProgress(80, 21, 1, first_answer_at=now, updated_at=now + 10))
    return run.folder.uri


def test_the_status_of_a_run_is_read_from_its_folder(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "status", run_dir]) == 0
    shown = capsys.readouterr().out
    assert "stopped" in shown
    assert "2 of 100 images" in shown
    assert "1 rendered again" in shown
    assert "Prompts rejected: 1 too similar" in shown
    assert "Images failed: 1 ValueError: no" in shown


def test_the_status_is_json_for_programs(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "status", run_dir, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["prompts"]["reasons"] == {"too similar": 1}
    assert status["images"]["skills"]["counting"]["failed"] == 1
    assert status["latest_start"]["found"] == 1
    assert status["latest_start"]["prompts_per_s"] == pytest.approx(2)


def test_a_status_is_watched_until_prompts_and_images_are_finished(
    run_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            RunFolder(run_dir).mark_done("generate", {})

    monkeypatch.setattr("selma_ray.cli.data.time", SimpleNamespace(sleep=sleep, time=time.time))  # not other threads'
    assert cli.main(["data", "status", run_dir, "--json", "--watch", "0.5"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["stopped"] * 3 + ["finished"]
    assert waits == [0.5] * 3
    assert cli.main(["data", "status", run_dir, "--watch"]) == 0
    assert "finished" in capsys.readouterr().out


def test_the_rate_of_an_earlier_start_is_not_shown(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = PromptProgress(wanted=80, kept=21, found=1, first_answer_at=1.0, updated_at=11.0)
    write_prompt_progress(RunFolder(run_dir), before)
    assert cli.main(["data", "status", run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latest_start"]["prompts_per_s"] is None


def test_exports_and_contact_sheets_are_files_of_the_run(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", run_dir, "--to", "imagefolder"]) == 0
    assert (Path(run_dir) / "exports" / "imagefolder" / "train" / "common" / "a.png").is_file()
    assert cli.main(["data", "sheet", run_dir]) == 0
    assert "<img" in (Path(run_dir) / "contact_sheet.html").read_text()
    assert cli.main(["data", "sheet", run_dir, "--out", str(tmp_path / "sheet.png"), "--per-skill", "1"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "status", "/nowhere"], "/nowhere must be a run's folder, it has no recipe.yaml"),
        (["export", "RUN", "--to", "zip"], "--to must be one of imagefolder, webdataset, got 'zip'"),
        (["data", "sheet", "RUN", "--per-skill", "0"], "--per-skill must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(run_dir: str, words: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([run_dir if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_overrides_are_for_recipes_alone(run_dir: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "status", run_dir, "seed=1"])


def test_images_that_wait_for_the_judge_are_counted(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_candidates(RunFolder(run_dir), table(row("c", "common"), row("d", "common")))
    assert cli.main(["data", "status", run_dir]) == 0
    assert "2 images wait for the judge" in capsys.readouterr().out
