"""`selma serve` is told to end while it draws: what was accepted is answered, what comes later is told when to come back."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from selma_ray.run.recipe import load_recipe
from selma_ray.storage import RunFolder
from tests.e2e.conftest import DEMO, REPOSITORY

pytestmark = pytest.mark.heavy

# By default Ray gives its node 30 s to start, which on a busy machine it does not meet.
ENVIRONMENT = {**os.environ, "RAY_raylet_start_wait_time_s": "180"}
START_TIMEOUT_S = 400
DRAIN_S = 240  # far beyond what the slow request takes on a busy machine
END_S = 30  # from the last answer until the process is gone; its own bound is 5 s
SLOW_STEPS = 600
SLOW = {"prompt": "two blue bananas to the left of a red car", "num_inference_steps": SLOW_STEPS, "seed": 1}
QUICK = {**SLOW, "num_inference_steps": 1}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def overrides(tmp_path: Path, miniature_pipeline: str) -> list[str]:
    """Return overrides of the demo for a run that has a merged model, its base itself, and nothing else."""
    words = [
        f"run_dir={tmp_path / 'run'}", f"serving.port={free_port()}", f"serving.drain_s={DRAIN_S}", "serving.experts=false",
        "serving.evaluator_replicas=0", f"serving.max_steps={SLOW_STEPS}", "serving.request_timeout_s=600",
        "serving.num_threads=1", "cluster.num_cpus=2", "skills=[miniature/common]",
    ]  # fmt: skip
    recipe = load_recipe(DEMO, words)
    run = RunFolder(recipe.run_dir)
    run.write_bytes(recipe.as_yaml().encode(), "recipe.yaml")
    merged = tmp_path / "run" / "merged" / recipe.merging.name
    merged.mkdir(parents=True)
    (merged / "pipeline").symlink_to(miniature_pipeline)
    run.mark_done("merge", {})
    return words


@pytest.fixture(scope="module")
def miniature_pipeline() -> str:
    from selma_ray.models.locate import MINIATURE, locate_text_to_image

    return locate_text_to_image(MINIATURE, None).path


@pytest.fixture
def start(overrides: list[str]) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Return a function that starts `selma serve` and returns its process and address once it says that it serves."""
    started: list[subprocess.Popen[str]] = []

    def run() -> tuple[subprocess.Popen[str], str]:
        words = [sys.executable, "-m", "selma_ray.cli", "serve", str(DEMO), *overrides]
        process = subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whatever these tests inherited: a shell's background job ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        stuck = threading.Timer(START_TIMEOUT_S, process.kill)
        stuck.start()
        printed = []
        for line in process.stdout or ():
            printed.append(line)
            if "http://" in line and "curl" not in line:
                stuck.cancel()
                address = next(word for word in line.split() if word.startswith("http://"))
                return process, address
        stuck.cancel()
        raise AssertionError("".join(printed))

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def in_flight(client: httpx.Client) -> float:
    """Return how many images the generator has accepted."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("selma_engine_in_flight{"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_and_what_comes_later_is_refused(
    start: Callable[[], tuple[subprocess.Popen[str], str]], number: signal.Signals
) -> None:
    process, address = start()
    workers = psutil.Process(process.pid).children(recursive=True)
    with httpx.Client(base_url=address, timeout=600, trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/v1/images/generations", json=QUICK).status_code == 200
        accepted = pool.submit(client.post, "/v1/images/generations", json=SLOW)
        while not in_flight(client):
            time.sleep(0.05)
        process.send_signal(number)
        refusals = []
        while not accepted.done():
            answer = client.post("/v1/images/generations", json=QUICK)
            refusals += [answer] if answer.status_code != 200 else []
            time.sleep(0.2)
        answered_s = time.monotonic()
        answer = accepted.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"]
    assert refusals, "the signal was heard before the slow request had ended"
    assert {refusal.status_code for refusal in refusals} == {503}
    assert {refusal.json()["error"]["code"] for refusal in refusals} == {"shutting_down"}
    assert all(int(refusal.headers["Retry-After"]) > 0 for refusal in refusals)
    printed, _ = process.communicate(timeout=END_S)
    assert process.returncode == 0, printed
    assert "Stopping; accepted requests have" in printed
    assert "Traceback" not in printed
    assert time.monotonic() - answered_s < END_S
    _, alive = psutil.wait_procs(workers, timeout=END_S)
    assert not alive, json.dumps([" ".join(each.cmdline())[:100] for each in alive])
