import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError
from selma_ray.run import lease
from selma_ray.run.lease import held, seconds_since_sign
from selma_ray.storage import RunFolder

HOLDER = """
import sys, time
from selma_ray.run.lease import held
from selma_ray.storage import RunFolder
with held(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "_SILENT_AFTER_S", 1.0)
    monkeypatch.setattr(lease, "_POLL_S", 0.05)


def write_lease(folder: RunFolder, **changes: Any) -> None:
    mine = {
        "holder": "x",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": 1,
        "since": "2026-01-01",
        "beat": 0,
        "renewed_at": time.time(),
    }
    folder.write_json(mine | changes, "lease.json")


def test_the_lease_is_given_back(folder: RunFolder) -> None:
    with held(folder):
        assert folder.exists("lease.json")
        with held(folder):
            pass
        assert folder.exists("lease.json")
    assert not folder.exists("lease.json")


def test_a_second_driver_is_told_who_works_there_and_takes_over_when_it_is_killed(folder: RunFolder) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, folder.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"is held by process {other.pid} on .* since 20.*; wait for it"),
            held(folder),
        ):
            pytest.fail("it is held")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with held(folder):
        assert folder.read_json("lease.json")["pid"] == os.getpid()


def test_a_number_that_another_process_has_by_now_holds_nothing(folder: RunFolder) -> None:
    write_lease(folder, started=12345)
    with held(folder):
        pass


@pytest.mark.usefixtures("quick")
def test_a_driver_of_another_machine_that_is_silent_holds_nothing(folder: RunFolder) -> None:
    write_lease(folder, host="elsewhere")
    with held(folder):
        assert folder.read_json("lease.json")["host"] == socket.gethostname()


@pytest.mark.usefixtures("quick")
def test_a_driver_of_another_machine_holds_as_long_as_its_heart_beats(folder: RunFolder) -> None:
    ended = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            write_lease(folder, host="elsewhere", beat=count)
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    write_lease(folder, host="elsewhere")
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"on elsewhere since 2026"), held(folder):
            pytest.fail("it is held")
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", json.dumps({"holder": 1}).encode()])
def test_a_lease_that_cannot_be_read_is_nobody_s(folder: RunFolder, content: bytes) -> None:
    folder.write_bytes(content, "lease.json")
    with held(folder):
        pass


@pytest.mark.usefixtures("quick")
def test_the_heart_beats(folder: RunFolder) -> None:
    with held(folder):
        deadline_s = time.monotonic() + 30
        while folder.read_json("lease.json")["beat"] < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_a_driver_that_works_there_gives_a_sign(folder: RunFolder) -> None:
    assert seconds_since_sign(folder) is None
    with held(folder):
        assert seconds_since_sign(folder) < 60
    write_lease(folder, renewed_at=time.time() - 100)
    assert 100 <= seconds_since_sign(folder) < 160
