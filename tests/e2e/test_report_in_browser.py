"""The report in headless Chromium: no console message, no request, every image drawn, nothing wider than a phone."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from selma_ray.evaluation.pairs import export_pairs
from selma_ray.evaluation.report import write_report
from tests.unit.evaluation.finished_runs import SKILLS, write_finished_run

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
PHONE, DESKTOP = (390, 844), (1280, 900)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
# Counts what a reader would miss; the answer is left where --dump-dom shows it.
PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  const answer = {
    images: images.length,
    drawn: images.filter(image => image.complete && image.naturalWidth > 0).length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    problems: problems,
  };
  document.body.dataset.probe = JSON.stringify(answer);
});
</script>
"""
WATCH = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message)), true);
for (const level of ["warn", "error"]) console[level] = (...words) => problems.push(words.join(" "));
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_finished_run(tmp_path_factory.mktemp("run"), max_prompts=20)
    write_report(folder, SKILLS)
    export_pairs(folder, folder.done("evaluate"), count=6, seed=0)
    return folder


def probe(page: Path, size: tuple[int, int], tmp_path: Path) -> tuple[dict, str]:
    """Open a copy of `page` that looks at itself; returns what it saw and Chromium's own log."""
    html = page.read_text().replace("<head>", "<head>" + WATCH, 1).replace("</body>", PROBE + "</body>", 1)
    watched = tmp_path / "watched.html"
    watched.write_text(html)
    words = [
        CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=5000", "--dump-dom", watched.as_uri(),
    ]  # fmt: skip
    finished = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    _, _, rest = finished.stdout.partition('data-probe="')
    answer = rest.partition('"')[0].replace("&quot;", '"')
    assert answer, finished.stdout[:500] + finished.stderr[-2000:]
    return json.loads(answer), finished.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("page", ["report.html", "pairs/index.html"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_page_opens_without_a_fault(run, page, size, tmp_path):
    seen, log = probe(run.local_path(page), size, tmp_path)
    assert seen["images"] > 10
    assert seen["drawn"] == seen["images"]
    assert seen["requests"] == []
    assert seen["problems"] == []
    assert "CONSOLE" not in log
    assert seen["width"] <= max(seen["window"], 500)  # headless Chromium's narrowest window is 500 px wide
