"""`ray job submit` against a local head, as on a cluster."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REPOSITORY, SMALL
from tests.local_ray import ENVIRONMENT, RAY, RayNode, free_port, wait_until


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Any]:
    """Start a head node with its own ports and temporary folder; yields the address of its dashboard."""
    dashboard_port, log = free_port(), tmp_path / "head.log"
    temp_dir = Path(f"/tmp/ray_{os.getpid()}")
    node = RayNode(
        "--head", f"--port={free_port()}", f"--dashboard-port={dashboard_port}", "--num-cpus=4", "--include-dashboard=true",
        f"--temp-dir={temp_dir}", "--object-store-memory=500000000", log=log,
    )  # fmt: skip
    try:
        wait_until(lambda: node.started and node.takes_jobs, log, node.process)
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        node.stop()
        shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.heavy
def test_the_loop_runs_as_a_job(head: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    submitted = subprocess.run(
        [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--",
         sys.executable, "-m", "jobs.run_selma", "jobs/recipes/demo.yaml", f"run_dir={run_dir}", *SMALL],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=590, env=ENVIRONMENT,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-2000:]
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "served.png").is_file()
