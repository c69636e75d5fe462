"""What a run counts, as Prometheus reads it from a node."""

import time
import urllib.request
from typing import Any

import ray

from selma_ray.cluster.metrics import count


def test_counts_of_driver_and_workers_are_on_the_node_s_endpoint(ray_cluster: Any) -> None:
    @ray.remote
    def train() -> None:
        count("selma_training_steps", 3, "runs/a", "train", expert="counting")
        time.sleep(12)  # a process hands on its counts every few seconds

    working = train.remote()
    count("selma_images_rendered", 2, "runs/a", "generate")
    expected = (
        ("ray_selma_training_steps_total", 'expert="counting"'),
        ("ray_selma_images_rendered_total", 'stage="generate"'),
    )
    deadline_s = time.monotonic() + 120
    while not all(_shown(name, tag) for name, tag in expected):
        assert time.monotonic() < deadline_s, _page()[-3000:]
        time.sleep(1)
    assert _shown(*expected[0]) == 3
    ray.get(working)


def _shown(name: str, tag: str) -> float:
    lines = [line for line in _page().splitlines() if line.startswith(name) and tag in line and 'run="runs/a"' in line]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def _page() -> str:
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=10) as answer:
        return answer.read().decode()
