"""The whole loop through the real command, killed once on the way, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import DEMO, REPOSITORY, SMALL


@pytest.mark.timeout(1500)
def test_a_killed_run_finishes_when_started_again_and_then_does_nothing(selma: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", *SMALL]

    killed = subprocess.Popen(
        [sys.executable, "-m", "selma_ray.cli", "run", str(DEMO), *overrides],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(lambda: any((run_dir / "images").rglob("*.parquet")), killed, timeout_s=500)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = _images(run_dir)

    finished = selma("run", *overrides)
    assert finished.returncode == 0, finished.stderr
    images = _images(run_dir)
    assert len(images) == len(set(images)) == 2 * 7 * 2, (
        "every training prompt of two skills has two images, none twice"
    )
    assert set(before) <= set(images), "what was finished before the kill is kept"
    assert "merged - base" in finished.stdout
    assert (run_dir / "served.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run_dir / "report.html").read_text()
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["evaluation"]["models"]) == {"base", "common", "counting", "merged"}
    assert not list(run_dir.rglob("*.part"))

    again = selma("evaluate", *overrides)
    assert again.returncode == 0
    assert "finished before" in again.stdout
    assert _images(run_dir) == images


def _images(run_dir: Any) -> Any:
    return sorted(
        identifier
        for path in (run_dir / "images").rglob("*.parquet")
        for identifier in pq.read_table(path)["id"].to_pylist()
    )


def _wait_for(condition: Any, process: Any, timeout_s: Any) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no image was written in time"
        time.sleep(0.2)
