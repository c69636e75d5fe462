"""`serve deploy serve/config.yaml` against a local head, as on a cluster."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from tests.tiny_experts import save_experts

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# By default Ray gives its node 30 s to start and a proxy 5 s, which on a busy machine neither meets.
PATIENCE = {"RAY_raylet_start_wait_time_s": "180", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port")
ENVIRONMENT = {**os.environ, **PATIENCE, "RAY_AUTH_MODE": "disabled"}
START_TIMEOUT_S = 240
BODY = {"prompt": "a red apple", "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a head node with its own ports and temporary folder; yields the address of its dashboard."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    temp_dir = Path(f"/tmp/ray_deploy_{os.getpid()}")
    log = tmp_path_factory.mktemp("head") / "head.log"
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000",
         f"--temp-dir={temp_dir}", "--disable-usage-stats", *(f"--{name}={port}" for name, port in ports.items())],
        cwd=REPOSITORY, env=ENVIRONMENT, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{ports['dashboard-port']}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return ask(f"{address}/api/version") is not None

    try:
        wait_until(answers, "the dashboard answers")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=120)
        shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def config(dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Deploy the shipped configuration on a free port; returns its file and the service's address."""
    content = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    (content["http_options"]["port"],) = free_ports(1)
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    wait_until(lambda: deploy(dashboard, file), "the configuration is accepted")
    wait_until(lambda: application_status(dashboard) == "RUNNING", "the application runs")
    return file, f"http://127.0.0.1:{content['http_options']['port']}"


@pytest.mark.heavy
def test_the_shipped_configuration_deploys_and_changes_its_weights_in_place(
    dashboard: str, config: tuple[Path, str], tmp_path: Path
) -> None:
    file, url = config
    assert ask(f"{url}/healthz") == {"status": "ok"}
    image = ask(f"{url}/v1/images/generations", {"prompt": "a red apple", "num_inference_steps": 2})
    assert image["size"] == "64x64"
    score = ask(f"{url}/v1/scores", {"prompt": "a red apple", "image": image["data"][0]["b64_json"]})
    assert 0 <= score["data"][0]["scores"]["dsg"] <= 1
    assert score["data"][0]["questions"]

    replica = engine_replicas(url)
    experts = save_experts(load_pipeline(ModelConfig(), "cpu"), tmp_path / "experts")
    before = ask(f"{url}/v1/images/generations", BODY)["data"]
    change(file, "deployments", 0, user_config={"adapter": experts["counting"]})
    assert deploy(dashboard, file)
    wait_until(lambda: ask(f"{url}/v1/images/generations", BODY)["data"] != before, "the weights are changed")
    assert engine_replicas(url) == replica
    change(file, "deployments", 0, user_config={})
    assert deploy(dashboard, file)
    wait_until(lambda: ask(f"{url}/v1/images/generations", BODY)["data"] == before, "the weights are changed back")


@pytest.mark.heavy
def test_a_redeployment_that_replaces_every_replica_loses_no_request(dashboard: str, config: tuple[Path, str]) -> None:
    file, url = config
    whole = pixels(ask(f"{url}/v1/images/generations", BODY))
    old = engine_replicas(url)
    ended = threading.Event()

    def client(_: int) -> list[Any]:
        drawn = []
        while not ended.is_set():
            drawn.append(pixels(ask(f"{url}/v1/images/generations", BODY)))  # raises for whatever is refused
        return drawn

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, number) for number in range(3)]
        try:
            change(file, "args", max_batch_size=4, max_prompt_chars=1000)
            assert deploy(dashboard, file)
            wait_until(lambda: not old & engine_replicas(url) and engine_replicas(url), "the replicas are replaced")
            wait_until(lambda: application_status(dashboard) == "RUNNING", "the application runs again")
        finally:
            ended.set()
        drawn = [image for each in clients for image in each.result()]
    assert drawn
    assert all(np.abs(image - whole).max() <= 1 for image in drawn)  # other images of a batch change the last bits
    with pytest.raises(AssertionError, match="at most 1000 characters"):
        ask(f"{url}/v1/images/generations", BODY | {"prompt": "x" * 1001})


def pixels(answer: dict[str, Any]) -> np.ndarray:
    content = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def engine_replicas(url: str) -> set[str]:
    """Return the names of the generator's replicas, which a restart would change."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        return set(re.findall(r'selma_engine_start_seconds{replica="(\w+)"}', response.read().decode()))


def change(file: Path, *path: str | int, **changes: Any) -> None:
    """Change a part of a deployed application's configuration."""
    content = yaml.safe_load(file.read_text())
    part = content["applications"][0]
    for key in path:
        part = part[key]
    part.update(changes)
    file.write_text(yaml.safe_dump(content))


def deploy(dashboard: str, config: Path) -> bool:
    """Run `serve deploy`; False while the head is too young to take it."""
    deployed = subprocess.run(
        [BIN / "serve", "deploy", "--address", dashboard, config],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    output = deployed.stdout + deployed.stderr
    assert deployed.returncode == 0 or "onnectionError" in output, output
    return deployed.returncode == 0


def application_status(dashboard: str) -> str:
    application = (ask(f"{dashboard}/api/serve/applications/") or {}).get("applications", {}).get("selma", {})
    assert application.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), application.get("message")
    return application.get("status", "")


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return the JSON answer, or None where nobody listens yet."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None
    except OSError:
        return None


def wait_until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
