"""A node, a trainer or Ray Train's controller that dies while an expert is fitted: the weights are those of an expert left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selma_ray.storage import RunFolder
from tests.e2e.conftest import REPOSITORY
from tests.local_ray import ENVIRONMENT, RayNode, free_port, wait_until
from tests.unit.experts.rendered_images import write_images

FIT = """
import sys
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.experts.config import ExpertsConfig, LoraSettings
from selma_ray.experts.launch import plan_experts, train_experts
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder

run_dir, model, address = sys.argv[1:]
cluster = ClusterConfig(address=address, use_labels=True)
connect(cluster)
print("connected", flush=True)
config = ExpertsConfig(
    lora=LoraSettings(rank=4, alpha=4), steps=60, batch_size=4, learning_rate=1e-2, precision="fp32", checkpoint_every_steps=10
)
train_experts(RunFolder(run_dir), plan_experts(["counting"], config), ModelConfig(name=model), 0, cluster)
"""
ADAPTER = "experts/counting/adapter_model.safetensors"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Start a head without CPUs; yields its address, a function that starts a node for training, and all nodes."""
    port, temp_dir, log = free_port(), Path(f"/tmp/ray_train_{os.getpid()}"), tmp_path / "nodes.log"
    memory = "--object-store-memory=100000000"
    words = ("--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temp_dir}", memory)
    nodes = [RayNode(*words, log=log)]
    address = f"127.0.0.1:{port}"

    def add_node() -> RayNode:
        nodes.append(RayNode(f"--address={address}", "--num-cpus=1", "--labels=role=train", memory, log=log))
        return nodes[-1]

    try:
        yield address, add_node, nodes
    finally:
        for node in reversed(nodes):
            node.stop()
        shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.heavy
def test_an_expert_whose_node_dies_ends_with_the_same_weights(
    cluster: Any, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    address, add_node, _ = cluster
    struck, spared = (tmp_path / name for name in ("struck", "spared"))
    write_images(RunFolder(str(struck)), "counting", 7)
    shutil.copytree(struck, spared)

    log = struck.with_suffix(".log")
    driver = start(struck, tiny_pipeline_dir, address)  # before there is a node, so that it belongs to the head
    wait_until(lambda: "connected" in log_of(struck), log, driver)
    first = add_node()
    wait_until(lambda: steps_done(struck) >= 25, log, driver)
    first.kill()
    add_node()
    assert driver.wait(timeout=300) == 0, log_of(struck)[-3000:]

    assert start(spared, tiny_pipeline_dir, address).wait(timeout=300) == 0, log_of(spared)[-3000:]
    assert (struck / ADAPTER).read_bytes() == (spared / ADAPTER).read_bytes()
    curves = [json.loads((run / "experts/counting/curve.json").read_text()) for run in (struck, spared)]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 60


@pytest.mark.heavy
@pytest.mark.parametrize("process", ["ray::RayTrainWorker", "ray::TrainController"])
def test_an_expert_whose_trainer_or_controller_is_killed_ends_with_the_same_weights(
    cluster: Any, tiny_pipeline_dir: Path, tmp_path: Path, process: str
) -> None:
    address, add_node, nodes = cluster
    struck, spared = (tmp_path / name for name in ("struck", "spared"))
    write_images(RunFolder(str(struck)), "counting", 7)
    shutil.copytree(struck, spared)
    add_node()

    driver = start(struck, tiny_pipeline_dir, address)
    wait_until(lambda: steps_done(struck) >= 25, struck.with_suffix(".log"), driver)
    (victim,) = {
        each.pid for node in nodes for each in node.processes() if " ".join(each.cmdline()).startswith(process)
    }
    os.kill(victim, signal.SIGKILL)
    if driver.wait(timeout=300):  # a driver without its controller ends, and the same command goes on
        assert process == "ray::TrainController", log_of(struck)[-3000:]
        assert start(struck, tiny_pipeline_dir, address).wait(timeout=300) == 0, log_of(struck)[-3000:]

    assert start(spared, tiny_pipeline_dir, address).wait(timeout=300) == 0, log_of(spared)[-3000:]
    assert (struck / ADAPTER).read_bytes() == (spared / ADAPTER).read_bytes()


def start(run: Path, model: Path, address: str) -> subprocess.Popen:
    """Start a driver that fits an expert to the images of a run's folder."""
    with run.with_suffix(".log").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", FIT, str(run), str(model), address],
            cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=output,
        )  # fmt: skip


def log_of(run: Path) -> str:
    return run.with_suffix(".log").read_text()


def steps_done(run: Path) -> int:
    progress = run / "experts" / "counting" / "progress.json"
    return json.loads(progress.read_text())["step"] if progress.exists() else 0
