import logging
import time
from typing import Any

import pytest
import ray

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import Demand
from selma_ray.cluster.waiting import announced_waits, missing_demands

JOINED = ClusterConfig(address="auto", use_labels=True)
LLM = Demand("prompts.llm.min_replicas", "llm", {"CPU": 1, "GPU": 1})


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the nodes of a cluster, to which a test may add."""
    there = [{"Alive": True, "Labels": {"role": "render"}, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    return there


def test_what_a_role_lacks_is_said_with_its_label(nodes: Any) -> None:
    assert missing_demands([LLM], JOINED) == ["role=llm, 1 CPU, 1 GPU (prompts.llm.min_replicas)"]
    nodes.append({"Alive": True, "Labels": {"role": "llm"}, "Resources": {"CPU": 8.0, "GPU": 1.0}})
    assert missing_demands([LLM], JOINED) == []
    two = Demand("images.min_renderers", "render", {"CPU": 1, "GPU": 2})
    assert missing_demands([two], ClusterConfig(address="auto")) == ["2 GPU (images.min_renderers)"]


def test_waiting_is_told_with_growing_pauses_until_the_block_ends(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []
    with caplog.at_level(logging.WARNING), announced_waits([LLM], JOINED, "generate", told.append, first_after_s=0.05):
        time.sleep(0.6)
    assert 2 <= len(told) <= 4, "after 0.05, 0.15 and 0.35 s"
    assert told[0].detail == "waiting for role=llm, 1 CPU, 1 GPU (prompts.llm.min_replicas): no node has it yet"
    assert "generate waiting for role=llm" in caplog.text
    count = len(told)
    time.sleep(0.2)
    assert len(told) == count


def test_nothing_is_told_where_nothing_is_lacking_or_the_cluster_is_local(nodes: Any) -> None:
    nodes.append({"Alive": True, "Labels": {"role": "llm"}, "Resources": {"CPU": 8.0, "GPU": 1.0}})
    for config in (JOINED, ClusterConfig(use_labels=True)):
        with announced_waits([LLM], config, "generate", pytest.fail, first_after_s=0.01):  # type: ignore[arg-type]
            time.sleep(0.1)
