"""The report in headless Chromium: no console message, no request, every image drawn, nothing wider than a phone."""

import pytest
from playwright.sync_api import Browser, ViewportSize

from selma_ray.evaluation.pairs import export_pairs
from selma_ray.evaluation.report import write_report
from selma_ray.storage import RunFolder
from tests.chromium import faults_of
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run

PHONE, DESKTOP = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = write_finished_run(tmp_path_factory.mktemp("run"), max_prompts=20)
    write_report(folder, SKILLS)
    export_pairs(folder, folder.done("evaluate"), count=6, seed=0)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["report.html", "pairs/index.html"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_page_opens_without_a_fault(chromium: Browser, run: RunFolder, name: str, size: ViewportSize) -> None:
    page = chromium.new_page(viewport=size)
    faults = faults_of(page)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    address = run.local_path(name).as_uri()
    page.goto(address)
    images = page.locator("img")
    assert images.count() > 10
    assert images.evaluate_all("all => all.every(image => image.complete && image.naturalWidth > 0)")
    assert [each for each in requested if not each.startswith("data:")] == [address]
    assert faults == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.close()
