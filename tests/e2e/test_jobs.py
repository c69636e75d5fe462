"""`ray job submit` against a local head, as on a cluster."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REPOSITORY, SMALL

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Any]:
    """Start a head node with its own ports and temporary folder; yields the address of its dashboard."""
    port, dashboard_port = _free_port(), _free_port()
    temp_dir = Path(f"/tmp/ray_{os.getpid()}")
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}", "--num-cpus=4",
         "--include-dashboard=true", f"--temp-dir={temp_dir}", "--object-store-memory=500000000", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    _wait_for_port(dashboard_port, process)
    yield f"http://127.0.0.1:{dashboard_port}"
    process.terminate()
    process.wait(timeout=60)
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.heavy
def test_the_loop_runs_as_a_job(head: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    submitted = subprocess.run(
        [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--",
         sys.executable, "-m", "jobs.run_selma", "jobs/recipes/demo.yaml", f"run_dir={run_dir}", *SMALL],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=590, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-2000:]
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "served.png").is_file()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for_port(port: Any, process: Any, timeout_s: int = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head node ended"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the dashboard did not answer")
