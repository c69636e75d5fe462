from typing import Any

import pytest
import ray

from selma_ray.cluster import placement
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import Demand, available_resources, check_fit, shared_resources, wait_until_free
from selma_ray.errors import ConfigError

LABELLED = ClusterConfig(use_labels=True)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    nodes = [
        {"Alive": True, "Labels": {"role": "llm"}, "Resources": {"CPU": 1.0, "GPU": 1.0}},
        {"Alive": True, "Labels": {"role": "llm"}, "Resources": {"CPU": 1.0}},
        {"Alive": False, "Labels": {"role": "render"}, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


def llm(**resources: Any) -> Demand:
    return Demand("prompts.llm.min_replicas", "llm", resources)


def renderers(**resources: Any) -> Demand:
    return Demand("images.min_renderers", "render", resources)


@pytest.mark.usefixtures("two_cpus")
def test_stages_that_fit_together_may_start(caplog: pytest.LogCaptureFixture) -> None:
    assert check_fit([llm(CPU=1), renderers(CPU=1)], ClusterConfig())
    assert check_fit([llm(CPU=0), renderers(CPU=2)], ClusterConfig(), take_turns=False)
    assert not caplog.text


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    ("demands", "message"),
    [
        (
            [llm(CPU=1), renderers(CPU=2.5)],
            "images.min_renderers must fit the local cluster's 2 CPU, needs 2.5; lower it",
        ),
        ([llm(CPU=1, GPU=1)], "prompts.llm.min_replicas must fit the local cluster's 0 GPU, needs 1; lower it"),
    ],
)
def test_a_stage_that_would_wait_for_ever_is_refused(demands: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fit(demands, ClusterConfig())


@pytest.mark.usefixtures("two_cpus")
def test_stages_that_must_take_turns_are_named_and_those_that_cannot_are_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not check_fit([llm(CPU=1), renderers(CPU=1.5)], ClusterConfig())
    words = "prompts.llm.min_replicas needs 1 and images.min_renderers needs 1.5, the local cluster has 2 CPU"
    assert f"{words}: they run one after the other" in caplog.text
    with pytest.raises(ConfigError, match=f"{words}, and they work at once; lower one of them"):
        check_fit([llm(CPU=1), renderers(CPU=1.5)], ClusterConfig(), take_turns=False)


@pytest.mark.usefixtures("two_cpus")
def test_a_role_has_what_the_nodes_with_its_label_have() -> None:
    assert available_resources("llm", LABELLED) == {"CPU": 2, "GPU": 1}
    check_fit([llm(CPU=2, GPU=1)], LABELLED)
    with pytest.raises(ConfigError, match="must fit the local cluster's 1 GPU, needs 2"):
        check_fit([llm(CPU=2, GPU=2)], LABELLED)


@pytest.mark.usefixtures("two_cpus")
def test_a_label_that_no_node_bears_is_refused_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"no node bears the label role=render, which images\.min_renderers needs; set it to"
    ):
        check_fit([llm(CPU=1), renderers(CPU=1)], LABELLED)


@pytest.mark.usefixtures("two_cpus")
def test_a_cluster_that_was_joined_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_fit([renderers(CPU=99)], ClusterConfig(address="auto"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_fit([renderers(CPU=99)], ClusterConfig())


def test_a_process_that_renders_and_judges_takes_the_larger_share() -> None:
    assert shared_resources({"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 2, "num_gpus": 0.25}) == {
        "num_cpus": 2, "num_gpus": 1,
    }  # fmt: skip
    assert shared_resources({"num_cpus": 1}, {}) == {"num_cpus": 1}


@pytest.mark.usefixtures("two_cpus")
def test_what_a_finished_stage_still_holds_is_waited_for_and_what_another_keeps_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = iter([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(free))
    wait_until_free([renderers(CPU=2, GPU=0)], ClusterConfig())
    assert next(free, None) is None
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    with pytest.raises(
        ConfigError, match=r"images\.min_renderers needs CPU, which something else on this cluster kept for 0\.1 s"
    ):
        wait_until_free([renderers(CPU=2)], ClusterConfig(), timeout_s=0.1)


def test_a_pool_that_does_not_end_by_itself_is_ended_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = {"a": "MapWorker(MapBatches(AnswerAtNoCost))", "b": "PromptFeed"}
    monkeypatch.setattr(
        "ray._private.state.actors",
        lambda actor_state_name: {key: {"ActorID": key, "ActorClassName": name} for key, name in alive.items()},
    )
    monkeypatch.setattr(placement, "_kill", alive.pop)
    monkeypatch.setattr(placement, "_POOLS_END_S", 0.0)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0 if "a" in alive else 2.0})
    wait_until_free([renderers(CPU=2)], ClusterConfig(), timeout_s=10)
    assert list(alive) == ["b"]
