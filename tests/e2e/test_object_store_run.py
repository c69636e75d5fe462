"""The whole loop with its run on object storage, on two nodes that share nothing else, killed and started again in every stage."""

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from selma_ray.storage import RunFolder
from tests.e2e.conftest import DEMO, REPOSITORY, SMALL
from tests.local_ray import ENVIRONMENT, NEEDS_MOUNT_NAMESPACE, RayNode, free_port, own_address, wait_until
from tests.object_store import BUCKET, Outage, object_store

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(3600),
    NEEDS_MOUNT_NAMESPACE,
]

_STORE = "--object-store-memory=300000000"
_STAGE_S = 900


@pytest.fixture(scope="module")
def outage() -> Outage:
    """Return how the store comes to have outages."""
    return Outage()


@pytest.fixture(scope="module")
def store(outage: Outage) -> Iterator[dict[str, str]]:
    """Yield the environment that leads to a store of objects with an empty bucket."""
    logging.getLogger("werkzeug").setLevel("ERROR")  # a line per request
    with object_store(outage) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.items():
            patch.setenv(name, value)
        filesystem, _ = fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
        filesystem.create_dir(BUCKET)
        yield dict(store)


@contextmanager
def two_nodes(folder: Path, store: dict[str, str]) -> Iterator[tuple[RayNode, dict[str, str]]]:
    """Yield the head of two nodes, each with a home that the other does not have, and the environment of a driver beside it."""
    homes = [folder / name for name in ("head-home", "worker-home")]
    for home in homes:
        home.mkdir(parents=True)
    host, port = own_address(), free_port()
    of_nodes = [{**ENVIRONMENT, **store, "HOME": str(home)} for home in homes]
    for each in of_nodes:
        each.pop("XDG_CACHE_HOME", None)
    head = RayNode(
        "--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=2", "--include-dashboard=false", _STORE,
        log=folder / "head.log", environment=of_nodes[0], hidden=homes[1],
    )  # fmt: skip
    nodes = [head]
    try:
        wait_until(lambda: head.started, folder / "head.log", head.process)
        worker = RayNode(
            f"--address={host}:{port}", "--num-cpus=2", _STORE,
            log=folder / "worker.log", environment=of_nodes[1], hidden=homes[0],
        )  # fmt: skip
        nodes.append(worker)
        wait_until(lambda: worker.started, folder / "worker.log", worker.process)
        yield head, {**of_nodes[0], "RAY_ADDRESS": f"{host}:{port}"}
    finally:
        for node in reversed(nodes):
            node.stop()


@pytest.fixture(scope="module")
def environment(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with two_nodes(tmp_path_factory.mktemp("nodes"), store) as (_, environment):
        yield environment


def test_a_new_cluster_goes_on_where_a_head_was_lost(store: dict[str, str], tmp_path: Path) -> None:
    folder = RunFolder(f"s3://{BUCKET}/lost-head")
    words = [*_command(folder, "generate"), "prompts.llm.engine=free", "prompts.per_skill=40"]
    with two_nodes(tmp_path / "first", store) as (head, environment):
        driver = subprocess.Popen(
            words, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: bool(_shards(folder)), tmp_path / "first" / "head.log", driver, timeout_s=_STAGE_S)
        before = _ids(folder)
        head.kill()
        _, said = driver.communicate(timeout=300)  # it ends by itself
        assert driver.returncode != 0
        assert said.strip()
    assert len(before) < 2 * 36 * 2
    with two_nodes(tmp_path / "second", store) as (_, environment):
        done = subprocess.run(
            words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=_STAGE_S, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    ids = _ids(folder)
    assert len(ids) == len(set(ids)) == 2 * 36 * 2
    assert set(before) <= set(ids), "nothing that was finished is lost or made anew"


@pytest.mark.parametrize("late_s", [0, 4], ids=["503", "slow"])
def test_a_minute_in_which_the_store_does_not_serve_is_waited_for(
    store: dict[str, str], outage: Outage, tmp_path: Path, late_s: float
) -> None:
    folder = RunFolder(f"s3://{BUCKET}/late-{late_s}")
    words = [*_command(folder, "generate"), "prompts.llm.engine=free", "prompts.per_skill=40"]
    with two_nodes(tmp_path, store) as (_, environment):
        driver = subprocess.Popen(
            words, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: bool(_shards(folder)), tmp_path / "head.log", driver, timeout_s=_STAGE_S)
        assert len(_ids(folder)) < 2 * 36 * 2
        outage.late_s, outage.met = late_s, 0
        outage.begin(60)
        _, said = driver.communicate(timeout=600)
    assert driver.returncode == 0, said[-3000:]
    assert outage.met > 0
    ids = _ids(folder)
    assert len(ids) == len(set(ids)) == 2 * 36 * 2


def test_every_stage_goes_on_where_it_was_killed(environment: dict[str, str]) -> None:
    folder = RunFolder(f"s3://{BUCKET}/run")
    reached: dict[str, Callable[[], bool]] = {
        "prompts": lambda: bool(folder.files("prompts")),
        "images": lambda: bool(folder.files("images", suffix=".parquet")),
        "train": lambda: bool(folder.files("experts", suffix="progress.json")),
        "merge": lambda: folder.done("train") is not None,
        "evaluate": lambda: bool(folder.files("evaluation", suffix=".parquet")),
    }
    for stage, holds in reached.items():
        _killed_when(holds, stage, folder, environment)
    finished = subprocess.run(
        _command(folder), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=_STAGE_S, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ids = _ids(folder)
    assert len(ids) == len(set(ids)) == 2 * 7 * 2, "every training prompt of two skills has two images, none twice"
    report = folder.read_json("report.json")
    assert set(report["evaluation"]["models"]) == {"base", "common", "counting", "merged"}
    assert folder.read_bytes("served.png").startswith(b"\x89PNG")
    assert [path for path in folder.files("experts") if "tensorboard" in path]
    assert not [path for path in folder.files() if path.endswith(".part")]
    assert not folder.exists("lease.json")
    again = [sys.executable, "-m", "selma_ray.cli", "run", folder.path("recipe.yaml")]
    done = subprocess.run(
        again, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=_STAGE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished before") == 4


def _killed_when(holds: Callable[[], bool], stage: str, folder: RunFolder, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        _command(folder), cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline_s = time.monotonic() + _STAGE_S
    try:
        while not holds():
            assert process.poll() is None, f"{stage}: {process.stderr.read()[-3000:]}"
            assert time.monotonic() < deadline_s, stage
            time.sleep(0.3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def _command(folder: RunFolder, command: str = "run") -> list[str]:
    return [sys.executable, "-m", "selma_ray.cli", command, str(DEMO), f"run_dir={folder.uri}", *SMALL]


def _shards(folder: RunFolder) -> list[str]:
    return folder.files("images", suffix=".parquet")


def _ids(folder: RunFolder) -> list[str]:
    return [
        row for path in _shards(folder) for row in pq.read_table(io.BytesIO(folder.read_bytes(path)))["id"].to_pylist()
    ]
