"""`ray job submit` to a head without workers: Ray's own autoscaler brings nodes for both roles, and takes them away again.

The nodes are processes on this machine, started by Ray's fake multi-node provider.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import REPOSITORY
from tests.local_ray import ENVIRONMENT, RAY, RayNode, free_port, own_address, wait_until

ROLES = {"llm": 2, "render": 3}  # most nodes of each
HEAD_NODE_ID = "f" * 51 + "00000"
WITH_AUTOSCALER = {
    **ENVIRONMENT, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # The first version of the autoscaler does not look at labels.
    "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
}  # fmt: skip


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Any]:
    """Start a head with no CPU and an autoscaler; yields the address of its dashboard."""
    port, dashboard_port = free_port(), free_port()
    config = tmp_path / "fake.json"
    config.write_text(json.dumps(autoscaler_config(f"{own_address()}:{port}")))
    temp_dir, log = Path(f"/tmp/ray_scale_{os.getpid()}"), tmp_path / "head.log"
    node = RayNode(
        "--head", "--num-cpus=0", f"--port={port}", f"--dashboard-port={dashboard_port}", f"--temp-dir={temp_dir}",
        f"--autoscaling-config={config}", "--object-store-memory=200000000", log=log, environment=WITH_AUTOSCALER,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        wait_until(lambda: node.takes_jobs and ask(f"{address}/api/version") is not None, log, node.process)
        yield address
    finally:
        node.stop()
        shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.heavy
def test_both_pools_grow_from_nothing_and_shrink_again(head: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = subprocess.Popen(
        [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--",
         sys.executable, "-m", "jobs.generate_data", "jobs/recipes/demo.yaml", f"run_dir={run_dir}", "cluster.use_labels=true",
         "skills=[miniature/common, miniature/counting]", "prompts.per_skill=150", "prompts.llm.engine=free",
         "prompts.llm.max_replicas=2", "prompts.llm.free.latency_s=0.5",
         "images.per_prompt=1", "images.selection=null", "images.engine=free", "images.batch_size=4",
         "images.max_renderers=3", "images.free.latency_s=1.5"],
        cwd=REPOSITORY, env=WITH_AUTOSCALER, stdout=(tmp_path / "job.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    most: dict[str, int] = dict.fromkeys(ROLES, 0)
    deadline_s = time.monotonic() + 400
    while job.poll() is None:
        assert time.monotonic() < deadline_s, (tmp_path / "job.log").read_text()[-3000:]
        for role in ROLES:
            most[role] = max(most[role], sum(node["labels"].get("role") == role for node in alive_nodes(head)))
        time.sleep(1)
    assert job.returncode == 0, (tmp_path / "job.log").read_text()[-3000:]
    assert 1 <= most["llm"] <= ROLES["llm"]
    assert 2 <= most["render"] <= ROLES["render"]
    ids = [id_ for path in (run_dir / "images").rglob("*.parquet") for id_ in pq.read_table(path)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 2 * (150 - 8)
    wait_until(
        lambda: not any("role" in node["labels"] for node in alive_nodes(head)), tmp_path / "job.log", timeout_s=120
    )


def autoscaler_config(gcs_address: str) -> dict[str, Any]:
    """Return what cluster.yaml says of its groups, for nodes of one CPU that are processes here."""
    workers = {
        role: {
            "resources": {"CPU": 1, "object_store_memory": 100_000_000}, "labels": {"role": role}, "node_config": {},
            "min_workers": 0, "max_workers": most,
        }
        for role, most in ROLES.items()
    }  # fmt: skip
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake", "max_workers": sum(ROLES.values()), "upscaling_speed": 1.0, "idle_timeout_minutes": 0.2,
        "provider": {
            # Named so, because the wheel lacks the file of defaults that the type "fake_multinode" reads.
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address, "launch_multiple": True, "head_node_id": HEAD_NODE_ID,
        }, "auth": {}, "docker": {},
        "available_node_types": {"ray.head.default": head, **workers}, "head_node_type": "ray.head.default",
        "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [],
        "rsync_filter": [], **{f"{name}_commands": [] for name in commands},
    }  # fmt: skip


def alive_nodes(dashboard: str) -> list[dict[str, Any]]:
    answer = ask(f"{dashboard}/api/v0/nodes?detail=1")
    nodes = answer["data"]["result"]["result"] if answer else []
    return [node for node in nodes if node["state"] == "ALIVE"]


def ask(url: str) -> Any:
    """Return the JSON answer, or None where nobody answers in time."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except OSError:
        return None
