"""A real filesystem that is full: one of a few kilobytes, mounted where no other process sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Renders into the folder it is given; prints the error that stopped it, or the ids of what it holds, and what is half-written.
RENDER = """
import json, sys
from pathlib import Path
from selma_ray.errors import StorageError
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.images.test_crashes import ids, run
folder = RunFolder(sys.argv[1])
try:
    run(folder, ModelConfig(name=sys.argv[2]))
    error = None
except StorageError as caught:
    error = str(caught)
parts = [str(path) for path in Path(sys.argv[1]).rglob("*.part")]
print(json.dumps({"error": error, "ids": ids(folder), "parts": parts}))
"""


def in_small_filesystem(disk: Path, *lines: str) -> list[str]:
    """Run shell lines where `disk` is a mounted filesystem of 44 kB; returns what they print."""
    script = "\n".join(["set -e", f"mount -t tmpfs -o size=44k selma '{disk}'", *lines])
    finished = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip().splitlines()


def test_a_full_disk_stops_rendering_with_one_line_and_it_resumes(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    disk, script = tmp_path / "disk", tmp_path / "render.py"
    disk.mkdir()
    script.write_text(RENDER)
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let a user mount a filesystem")
    render = f"PYTHONPATH=. '{sys.executable}' '{script}' '{disk}/run' '{tiny_pipeline_dir}'"
    first, second = map(json.loads, in_small_filesystem(disk, render, f"mount -o remount,size=9m '{disk}'", render))
    assert first["error"].startswith(f"no space left to write {disk}/run/")
    assert "\n" not in first["error"]
    assert first["parts"] == second["parts"] == []
    assert second["error"] is None
    assert 0 < len(first["ids"]) < len(second["ids"]) == len(set(second["ids"])) == 14
    assert set(first["ids"]) < set(second["ids"])
