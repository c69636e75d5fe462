import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from selma_ray.evaluation.report import write_report
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run


class Page(HTMLParser):
    """Collects what a page would ask the network for, and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.words: list[str] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "link"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "circle", "polyline")

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_finished_run(tmp_path_factory.mktemp("run"), max_prompts=20)
    assert write_report(folder, SKILLS) == folder.path("report.html")
    return folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    page = Page()
    page.feed(run.read_bytes("report.html").decode())
    assert page.open_tags == []
    return page


def text_of(page: Page) -> str:
    return " ".join(" ".join(page.words).split())


def test_page_asks_the_network_for_nothing(run, page):
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    html = run.read_bytes("report.html").decode()
    assert not re.search(r"@import|url\(|<script|https?://", html)


def test_page_shows_every_figure_of_the_summary(run, page):
    text, summary = text_of(page), run.done("evaluate")
    for scores in summary["models"].values():
        for value in (scores["dsg"], *scores["interval"], *scores["skills"].values()):
            assert f"{100 * value:.1f}" in text
    low, high = summary["difference"]["interval"]
    assert f"95% interval {100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−") in text
    for heading in (
        "Scores",
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
def test_headline_says_what_the_interval_says(tmp_path, interval, statement):
    folder = write_finished_run(tmp_path, max_prompts=5)
    summary = folder.done("evaluate")
    summary["difference"]["interval"] = interval
    folder.mark_done("evaluate", summary)
    write_report(folder, SKILLS)
    assert statement in folder.read_bytes("report.html").decode()


def test_report_for_machines_holds_the_same_and_no_images(run):
    report = run.read_json("report.json")
    summary = run.done("evaluate")
    assert report["evaluation"]["models"] == summary["models"]
    assert report["merging"]["energy_kept"] == 0.63
    assert len(report["examples"]["first"]) == 15
    assert "base64" not in json.dumps(report)
    gains = [example["merged"] - example["base"] for example in report["examples"]["gains"]]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)


def test_comparison_has_a_row_for_each_model(run):
    with Image.open(run.local_path("comparison.png")) as image:
        assert image.width > 10 * 128
        assert 2 * 128 < image.height < 2 * 150


def test_report_without_optional_parts(tmp_path):
    folder = write_finished_run(tmp_path, max_prompts=5)
    for path in ("experts", "images", "merged", "done/generate.json"):
        folder.delete(path)
    write_report(folder, SKILLS)
    page = Page()
    page.feed(folder.read_bytes("report.html").decode())
    assert "Scores" in text_of(page)
    assert "Merging" not in text_of(page)
