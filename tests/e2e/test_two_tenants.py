"""Two runs at once on one cluster, then two services side by side, each of which comes and goes without the other's notice."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import DEMO, REPOSITORY, SMALL
from tests.local_ray import ENVIRONMENT, RayNode, free_port, own_address, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2400)]

TENANTS = ("one", "two")
CHEAP = ["prompts.llm.engine=free", "images.engine=free", "experts.steps=2", "serving.evaluator_replicas=0"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the environment of drivers that join one node."""
    log = tmp_path_factory.mktemp("node") / "head.log"
    host, port = own_address(), free_port()
    head = RayNode(
        "--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=6", "--include-dashboard=false",
        "--object-store-memory=300000000", log=log,
    )  # fmt: skip
    try:
        wait_until(lambda: head.started, log, head.process)
        yield {**ENVIRONMENT, "RAY_ADDRESS": f"{host}:{port}"}
    finally:
        head.stop()


def start(command: str, tenant: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    words = [f"run_dir={folder / tenant}", *SMALL, *CHEAP, f"serving.route_prefix=/{tenant}"]
    return subprocess.Popen(
        [sys.executable, "-m", "selma_ray.cli", command, str(DEMO), *words],
        cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def url_of(service: subprocess.Popen[str]) -> str:
    """Read a service's output up to its address."""
    assert service.stdout
    seen = []
    for line in service.stdout:
        seen.append(line)
        if "Serving" in line:
            return next(word for word in line.split() if word.startswith("http"))
    pytest.fail("".join(seen) + (service.stderr.read() if service.stderr else ""))


def image(url: str) -> str:
    body = json.dumps({"prompt": "a red ball", "seed": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as answer:
        return str(json.load(answer)["data"][0]["b64_json"])


def test_runs_and_services_share_a_cluster(environment: dict[str, str], tmp_path: Path) -> None:
    runs = [start("run", tenant, tmp_path, environment) for tenant in TENANTS]
    for tenant, run in zip(TENANTS, runs, strict=True):
        _, errors = run.communicate(timeout=1500)
        assert run.returncode == 0, errors[-3000:]
        done = {path.stem for path in (tmp_path / tenant / "done").iterdir()}
        assert done == {"generate", "train", "merge", "evaluate"}

    services = [start("serve", tenant, tmp_path, environment) for tenant in TENANTS]
    try:
        urls = [url_of(service) for service in services]
        assert [url.rpartition("/")[2] for url in urls] == list(TENANTS)
        before = [image(url) for url in urls]
        services[0].send_signal(signal.SIGTERM)
        assert services[0].wait(timeout=60) == 0, services[0].stderr and services[0].stderr.read()
        time.sleep(3)
        assert image(urls[1]) == before[1]
        services[1].send_signal(signal.SIGTERM)
        assert services[1].wait(timeout=60) == 0
    finally:
        for service in services:
            service.kill()
            service.communicate()
