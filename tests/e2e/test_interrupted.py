"""A command that is interrupted, or stopped as job managers do it, ends with one line."""

import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.parametrize(
    ("interrupts", "sent"),
    [(signal.SIG_DFL, [signal.SIGINT]), (signal.SIG_IGN, [signal.SIGINT, signal.SIGTERM])],
    ids=["foreground", "job of a shell script"],  # which ignores Ctrl-C, as it was not meant for it
)
def test_a_signal_ends_a_command_with_one_line(
    interrupts: signal.Handlers, sent: list[signal.Signals], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "selma_ray.cli", "generate", str(DEMO), f"run_dir={tmp_path / 'run'}", *LONG]
    process = subprocess.Popen(
        words,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),  # whatever these tests inherited
    )
    try:
        shown = []
        for line in process.stdout or ():
            shown.append(line)
            if "prompts: " in line:
                break
        assert shown[-1].startswith("  generate 0/"), shown
        assert "no image yet" in shown[-1]
        for signal_ in sent:
            assert process.poll() is None
            process.send_signal(signal_)
            time.sleep(1)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "Interrupted; the same command goes on where this one stopped."
    assert not [word for word in ("SIGTERM", "Traceback") if word in errors], errors
