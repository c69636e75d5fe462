import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from selma_ray.cli import commands as cli
from selma_ray.cli import show as console
from selma_ray.cli.bars import progress_display
from selma_ray.errors import ConfigError
from selma_ray.progress import Progress
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that hands back what the console has shown so far."""
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, width=100, highlight=False, soft_wrap=True))
    return output.getvalue


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    folder = write_finished_run(tmp_path, max_prompts=10)
    return SimpleNamespace(folder=folder, skill_names=SKILLS, recipe=SimpleNamespace(seed=0))


def test_an_evaluation_shows_its_table_its_failures_and_its_report(run: SimpleNamespace, shown: Any) -> None:
    summary = run.folder.done("evaluate")
    summary["models"]["merged"]["unscored"] = {"images": 2, "reasons": {"torn": 2}, "first": []}
    summary["models"]["base"]["skills"]["style"] = None
    run.folder.mark_done("evaluate", summary)
    console.show_evaluation(run)  # type: ignore[arg-type]
    text = shown()
    assert "merged: 2 of 10 images have no score: torn" in text
    assert "merged - base: " in text
    assert "–" in text
    assert run.folder.path("report.html") in text.replace("\n", "")


def test_pairs_are_exported_rated_and_counted(run: SimpleNamespace, shown: Any, tmp_path: Path) -> None:
    console.export_pairs(run, 4)  # type: ignore[arg-type]
    key = run.folder.read_json("pairs", "key.json")
    lines = ["export,pair,rater,choice"]
    for pair, sides in key["pairs"].items():
        lines.append(f"{key['export']},{pair},ann,{'left' if sides['left'] == 'merged' else 'right'}")
    (tmp_path / "ann.csv").write_text("\n".join(lines))
    console.show_ratings(run, [str(tmp_path / "ann.csv")])  # type: ignore[arg-type]
    assert "merged preferred in 4 of 4 pairs, base in 0, neither in 0: 100.0% of the decided ones" in shown()
    with pytest.raises(ConfigError, match="--pairs must be at least 1, got 0"):
        console.export_pairs(run, 0)  # type: ignore[arg-type]


FIGURES = "prompts: 3 of 9 kept, 1 rejected (1 duplicate)", "images: 2/s, 0.1 min left, 0 failed"


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(shown: Any) -> None:
    with progress_display(console.console) as report:
        report(Progress("generate", 1, 9, "style: an early one", FIGURES))
        report(Progress("generate", 9, 9, "style: a sign that says [/b]", FIGURES))
        report(Progress("generate", 9, 9, "style: a sign that says [/b]", FIGURES))  # what stands still is said once
    assert shown() == f"  generate 9/9; {FIGURES[0]}; {FIGURES[1]}; style: a sign that says [/b]\n"


def test_progress_on_a_terminal_has_figures_below_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    terminal = Console(file=output, width=120, force_terminal=True, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "console", terminal)
    with progress_display(console.console) as report:
        report(Progress("generate", 3, 9, "style: a sign that says [/b]", FIGURES))
    text = output.getvalue()
    assert "3/9" in text
    assert "a sign that says [/b]" in text
    assert all(figure in text for figure in FIGURES)


def test_options_of_raters_belong_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "_execute", seen.append)
    assert (
        cli.main(["evaluate", "r.yaml", "--export-pairs", "--pairs", "9", "--ratings", "a", "--ratings", "b", "x=1"])
        == 0
    )
    assert (seen[0].export_pairs, seen[0].pairs, seen[0].ratings, seen[0].overrides) == (True, 9, ["a", "b"], ["x=1"])
    with pytest.raises(SystemExit):
        cli.main(["train", "r.yaml", "--export-pairs"])


def test_prompts_that_are_cut_are_told_where_there_are_any() -> None:
    summary: dict[str, Any] = {
        "prompts": {"kept": 40, "rejected": 2},
        "images": {"rendered": 36, "failed": 0},
        "long_prompts": {"prompts": 40, "cut": 3, "limit": 77, "longest": 91},
    }
    line = console._summary_line("generate", summary)
    assert line.endswith("; 3 of 40 prompts are cut at the 77 tokens that the model sees, the longest has 91")
    for lengths in (None, {"prompts": 40, "cut": 0, "limit": 77, "longest": 70}):
        assert "cut" not in console._summary_line("generate", summary | {"long_prompts": lengths})
