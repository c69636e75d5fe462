"""A run_dir on the driver's disk alone: refused before anything is written, on two nodes whose filesystems differ."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY
from tests.local_ray import ENVIRONMENT, NEEDS_MOUNT_NAMESPACE, RayNode, free_port, own_address, wait_until

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),
    NEEDS_MOUNT_NAMESPACE,
]


_STORE = "--object-store-memory=150000000"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """Yield the address of two nodes, a folder that the second does not see, and one that both see."""
    folder = tmp_path_factory.mktemp("nodes")
    private, shared = folder / "private", folder / "shared"
    private.mkdir()
    shared.mkdir()
    host, port = own_address(), free_port()
    head = RayNode(
        "--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=2", "--include-dashboard=false", _STORE,
        log=folder / "head.log",
    )  # fmt: skip
    nodes = [head]
    try:
        wait_until(lambda: head.started, folder / "head.log", head.process)
        worker = RayNode(f"--address={host}:{port}", "--num-cpus=2", _STORE, log=folder / "worker.log", hidden=private)
        nodes.append(worker)
        wait_until(lambda: worker.started, folder / "worker.log", worker.process)
        yield f"{host}:{port}", private, shared
    finally:
        for node in reversed(nodes):
            node.stop()


def generate(address: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    words = [
        "generate", "jobs/recipes/demo.yaml", f"run_dir={run_dir}", "prompts.llm.engine=free", "images.engine=free",
        "images.selection=null", "images.per_prompt=1", "prompts.per_skill=4", "prompts.per_request=4", "skills=[coco]",
        "evaluation.max_prompts=5",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "selma_ray.cli", *words],
        cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_folder_of_the_driver_s_disk_is_refused_before_work(cluster: tuple[str, Path, Path]) -> None:
    address, private, _ = cluster
    done = generate(address, private / "run")
    assert done.returncode == 1, done.stderr
    assert f"run_dir {private / 'run'} must be storage that all nodes share" in done.stderr
    assert "does not see what the driver writes there" in done.stderr
    assert not (private / "run" / "prompts").exists()
    assert not (private / "run" / "lease.json").exists()


def test_a_folder_that_both_nodes_see_is_filled(cluster: tuple[str, Path, Path]) -> None:
    address, _, shared = cluster
    done = generate(address, shared / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (shared / "run" / "probes").exists()
