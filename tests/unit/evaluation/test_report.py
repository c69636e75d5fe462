import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selma_ray.evaluation.report import write_report
from selma_ray.storage import RunFolder
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run


class Page(HTMLParser):
    """Collects what a page would ask the network for, and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.words: list[str] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: Any, attributes: Any) -> None:
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "link", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: Any, attributes: Any) -> None:
        assert tag in ("line", "circle", "polyline")

    def handle_endtag(self, tag: Any) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: Any) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_finished_run(tmp_path_factory.mktemp("run"), max_prompts=20)
    assert write_report(folder, SKILLS) == folder.path("report.html")
    return folder


@pytest.fixture(scope="module")
def page(run: Any) -> Page:
    page = Page()
    page.feed(run.read_bytes("report.html").decode())
    assert page.open_tags == []
    return page


def text_of(page: Page) -> str:
    return " ".join(" ".join(page.words).split())


def test_page_asks_the_network_for_nothing(run: Any, page: Page) -> None:
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    html = run.read_bytes("report.html").decode()
    assert not re.search(r"@import|url\(|<script|https?://", html)


def test_page_shows_every_figure_of_the_summary(run: Any, page: Page) -> None:
    text, summary = text_of(page), run.done("evaluate")
    for scores in summary["models"].values():
        for value in (scores["dsg"], *scores["interval"], *scores["skills"].values()):
            assert f"{100 * value:.1f}" in text
    low, high = summary["difference"]["interval"]
    assert f"95% interval {100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−") in text
    for heading in (
        "Scores",
        "Against base",
        "The same answers under other scorers",
        "How far the judge can be trusted",
        "Base and merged side by side",
        "Training",
        "Merging",
        "Training data",
        "How to reproduce",
    ):
        assert heading in text


@pytest.mark.parametrize(
    ("interval", "statement"),
    [
        ([0.01, 0.2], "follows these prompts better than the base"),
        ([-0.2, -0.01], "follows these prompts worse than the base"),
        ([-0.1, 0.1], "No difference can be claimed"),
        ([0.0, 0.1], "No difference can be claimed"),
    ],
)
def test_headline_says_what_the_interval_says(tmp_path: Path, interval: Any, statement: str) -> None:
    folder = write_finished_run(tmp_path, max_prompts=5)
    summary = folder.done("evaluate")
    summary["difference"]["interval"] = interval
    folder.mark_done("evaluate", summary)
    write_report(folder, SKILLS)
    assert statement in folder.read_bytes("report.html").decode()


def test_report_for_machines_holds_the_same_and_no_images(run: Any) -> None:
    report = run.read_json("report.json")
    summary = run.done("evaluate")
    assert report["evaluation"]["models"] == summary["models"]
    assert report["merging"]["energy_kept"] == 0.63
    assert len(report["examples"]["first"]) == 15
    assert "base64" not in json.dumps(report)
    gains = [example["merged"] - example["base"] for example in report["examples"]["gains"]]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)


def test_differences_of_every_model_stand_with_corrected_tests(run: Any, page: Page) -> None:
    text, differences = text_of(page), run.done("evaluate")["differences"]
    assert set(differences) == {"merged", *SKILLS}
    for row in differences.values():
        assert f"{row['wins']} {row['losses']} {row['ties']}" in re.sub(r"\s+", " ", text)
        for name in ("p_sign_holm", "p_bootstrap_holm"):
            shown = "p < 0.001" if row[name] < 0.001 else f"p = {row[name]:.3f}"
            assert shown in text


def test_the_judges_errors_are_stated(run: Any, page: Page) -> None:
    text, trust = text_of(page), run.done("evaluate")["judge_error"]
    low, high = trust["differences"]["merged"]["interval"]
    assert f"the difference is {100 * trust['differences']['merged']['mean']:+.1f} points".replace("-", "−") in text
    assert f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−") in text
    for row in trust["bins"]:
        assert f"P(yes) {100 * row['p_yes']:.1f}%: {100 * row['share']:.1f}% of {row['count']} are true" in text


def test_answers_stand_side_by_side_and_a_void_yes_is_marked(run: Any) -> None:
    html = run.read_bytes("report.html").decode()
    assert html.count('<span class="yes">yes</span>') > 20
    assert html.count('<span class="no">no</span>') > 20
    assert "does not count: a question that it depends on was denied" in html
    verdicts = run.read_json("report.json")["examples"]["first"][0]["verdicts"]
    assert set(verdicts[0]["base"]) == {"text", "counted"}


def test_dev_scores_and_the_checkpoint_that_was_kept_are_shown(run: Any, page: Page) -> None:
    points = run.read_json("experts", "style", "dev_scores.json")
    best = max(points, key=lambda point: point["dsg"])
    assert f"best dev {100 * best['dsg']:.1f}% at step {best['step']}" in text_of(page)
    assert run.read_bytes("report.html").count(b'class="devdot"') == len(SKILLS) * len(points)


def test_the_curve_of_every_expert_is_drawn_and_that_of_what_is_fitted_to_all_skills(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.local_path(), tmp_path / "run")
    folder = RunFolder(str(tmp_path / "run"))
    html = folder.read_bytes("report.html").decode()
    assert re.findall(r'aria-label="loss of ([^"]+)"', html) == SKILLS
    folder.write_json(folder.read_json("experts", "style", "curve.json"), "experts", "mixed-r80", "curve.json")
    folder.mark_done("train", dict.fromkeys([*SKILLS, "mixed-r80"]))
    write_report(folder, SKILLS)
    html = folder.read_bytes("report.html").decode()
    assert re.findall(r'aria-label="loss of ([^"]+)"', html) == [*SKILLS, "mixed-r80"]


def test_the_command_to_reproduce_names_the_runs_own_recipe(run: Any, page: Page) -> None:
    assert f"selma run {run.path('recipe.yaml')} run_dir=runs/again" in text_of(page)
    assert run.read_json("report.json")["versions"]["selma_ray"]


def test_each_part_names_the_command_that_makes_it(run: Any) -> None:
    html = run.read_bytes("report.html").decode()
    made = set(re.findall(r'<a href="#reproduce">Made by</a> <code>([^<]+)</code>', html))
    recipe = run.path("recipe.yaml")
    assert {f"selma {stage} {recipe}" for stage in ("train", "evaluate", "generate")} <= made
    assert 'id="reproduce"' in html
    assert "@media print" in html


def test_failures_other_judges_and_ratings_are_told(tmp_path: Path) -> None:
    folder = write_finished_run(tmp_path, max_prompts=5)
    summary = folder.done("evaluate")
    summary["judges"] = {"ties": "blip@1"}
    summary["models"]["merged"] |= {
        "unreadable_answers": 4,
        "unscored": {"images": 1, "reasons": {"the image cannot be read": 1}, "first": []},
    }
    summary["judge_error"] = None
    folder.mark_done("evaluate", summary)
    share = {"mean": 0.75, "interval": [0.4281, 0.9451], "count": 12}
    ratings = {"raters": 2, "pairs": 16, "unrated": 0, "wins": 9, "ties": 4, "losses": 3, "share": share, "p": 0.146}
    folder.write_json(ratings, "pairs", "result.json")
    write_report(folder, SKILLS)
    page = Page()
    page.feed(folder.read_bytes("report.html").decode())
    text = text_of(page)
    assert (
        "merged: 4 answers could not be read and are left out, among them all of 1 of 5 images (1 × the image" in text
    )
    assert "ties was judged by blip@1" in text
    assert "How far the judge can be trusted" not in text
    assert "2 raters saw 16 pairs" in text
    assert "75.0% of the decided pairs, 95% binomial interval 42.8–94.5 (p = 0.146)" in text


def test_metrics_of_images_that_were_scored_later_are_shown(tmp_path: Path) -> None:
    folder = write_finished_run(tmp_path, max_prompts=5)
    base = {"mean": 20.5, "interval": [20.1, 20.9], "over_base": None, "images": 5, "unscored": {"torn": 1}}
    over_base = {"mean": -0.25, "interval": [-0.5, 0.0], "p": 0.04}
    merged = {"mean": 20.25, "interval": [20.0, 20.5], "over_base": over_base, "images": 5, "unscored": {}}
    metric = {"metric": "pickscore (some/model@1)", "prompts": 5, "models": {"base": base, "merged": merged}}
    folder.write_json(metric, "evaluation", "metrics", "pickscore.json")
    write_report(folder, SKILLS)
    page = Page()
    page.feed(folder.read_bytes("report.html").decode())
    text = text_of(page)
    assert "pickscore (some/model@1)" in text
    assert "20.25 20–20.5 −0.25 −0.5 to +0 p = 0.040" in text
    assert "base: 1 of 5 images have no score: torn" in text


def test_comparison_has_a_row_for_each_model(run: Any) -> None:
    with Image.open(run.local_path("comparison.png")) as image:
        assert image.width > 10 * 128
        assert 2 * 128 < image.height < 2 * 150


def test_report_without_optional_parts(tmp_path: Path) -> None:
    folder = write_finished_run(tmp_path, max_prompts=5)
    for path in ("experts", "images", "merged", "done/generate.json"):
        folder.delete(path)
    write_report(folder, SKILLS)
    page = Page()
    page.feed(folder.read_bytes("report.html").decode())
    assert "Scores" in text_of(page)
    assert "Merging" not in text_of(page)
