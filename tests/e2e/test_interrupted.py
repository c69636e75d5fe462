"""A command that is interrupted, or stopped as job managers do it, ends with one line."""

import signal
import subprocess
import sys

import pytest

from tests.e2e.conftest import DEMO, REPOSITORY

# No image comes before the signal.
LONG = [
    "skills=[miniature/common]",
    "prompts.llm.engine=free",
    "images.engine=free",
    "images.free.latency_s=600",
    "images.per_prompt=1",
    "images.selection=null",
]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_line(sent, tmp_path):
    words = [sys.executable, "-m", "selma_ray.cli", "generate", str(DEMO), f"run_dir={tmp_path / 'run'}", *LONG]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        if line.startswith("  generate 0/"):
            break
    assert "prompts: " in line
    assert "no image yet" in line
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "Interrupted; the same command goes on where this one stopped."
    assert not [word for word in ("SIGTERM", "Traceback") if word in errors], errors
