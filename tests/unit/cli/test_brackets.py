"""Paths and titles with brackets, which rich reads as markup, are printed whole."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from selma_ray.cli import data, show, show_plan
from selma_ray.run.recipe import load_recipe
from selma_ray.storage import RunFolder
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"


@pytest.fixture(params=["[bold]run", "a[/x]b", "[red]r[/red]", "run[1]", "[link=a]y", "[/]"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    folder = write_finished_run(tmp_path / request.param, max_prompts=10)
    return SimpleNamespace(folder=folder, skill_names=SKILLS, recipe=SimpleNamespace(seed=0))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    output = io.StringIO()
    for module in (show, data):
        monkeypatch.setattr(module, "console", Console(file=output, width=100, highlight=False, soft_wrap=True))
    return output.getvalue


def test_reports_pairs_and_finished_stages_name_their_folder(run: Any, shown: Any) -> None:
    show.write_report(run)
    assert run.folder.path("report.html") in shown()
    show.export_pairs(run, 4)
    assert run.folder.path("pairs", "index.html") in shown()
    run.folder.mark_done("merge", {})
    show.run_one(run, "merge")
    assert f"finished before, in {run.folder.uri}" in shown()


def test_sheets_and_exports_name_their_target(
    run: Any, shown: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("selma_ray.images.sheet.contact_sheet", lambda *_: b"page")
    data._write_sheet(run, None, 1, 0)
    assert run.folder.path("contact_sheet.html") in shown()
    monkeypatch.setattr("selma_ray.images.card.card_text", lambda *_: "card")
    monkeypatch.setattr("selma_ray.images.export.export_images", lambda *_: 3)
    recipe = load_recipe(DEMO, ["run_dir=x"])
    target = str(tmp_path / "[bold]out[1]")
    data._export(SimpleNamespace(recipe=recipe, folder=run.folder, skill_names=SKILLS), "imagefolder", target)  # type: ignore[arg-type]
    assert f"3 images exported to {RunFolder(target).uri}" in shown()


def test_titles_of_a_study_are_whole(shown: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = SimpleNamespace(title="rank [4] of [bold]LoRA", do=lambda report: None)
    monkeypatch.setattr("selma_ray.study.run.study_steps", lambda study: [step])
    show.run_study(SimpleNamespace(results=RunFolder("/[bold]x")))  # type: ignore[arg-type]
    assert shown().count("rank [4] of [bold]LoRA") == 2
    assert "Tables: /[bold]x/tables.md" in shown()


def test_the_status_and_the_plan_name_folder_and_model(
    shown: Any, tmp_path: Path, tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"kept": 0, "rejected": 0, "rendered": 0, "failed": 0, "skills": {}, "reasons": {}}
    status = {"run": "/runs/[bold]x", "state": "stopped", "prompts": counts, "images": counts, "images_unjudged": 0}
    data._show(status)
    assert "/runs/[bold]x: stopped" in shown()
    model = tmp_path / "[bold]model[1]"
    model.symlink_to(tiny_pipeline_dir)
    show_plan.show_plan(load_recipe(DEMO, [f"run_dir={tmp_path}", f"model.name={model}"]), 100)
    assert str(model) in capsys.readouterr().out
