import warnings

import pytest
import ray
from ray.util.annotations import RayDeprecationWarning

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import _configure_output
from selma_ray.cluster.placement import check_fit
from selma_ray.errors import ConfigError


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})


@pytest.mark.usefixtures("two_cpus")
def test_stages_that_fit_together_may_start():
    check_fit({"prompts.llm": {"CPU": 1}, "images": {"CPU": 1}}, ClusterConfig())
    check_fit({"prompts.llm": {"CPU": 0}, "images": {"CPU": 2}}, ClusterConfig())


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    ("demands", "message"),
    [
        ({"a": {"CPU": 1}, "b": {"CPU": 2.5}}, "b must fit the local cluster's 2 CPU, needs 2.5; lower it"),
        ({"a": {"CPU": 1, "GPU": 1}, "b": {"CPU": 1}}, "a must fit the local cluster's 0 GPU, needs 1; lower it"),
    ],
)
def test_a_stage_that_would_wait_for_ever_is_refused(demands, message):
    with pytest.raises(ConfigError, match=message):
        check_fit(demands, ClusterConfig())


@pytest.mark.usefixtures("two_cpus")
def test_stages_that_must_take_turns_are_named(caplog):
    check_fit({"a": {"CPU": 1}, "b": {"CPU": 1.5}}, ClusterConfig())
    assert "a needs 1 and b needs 1.5, the local cluster has 2 CPU: they run one after the other" in caplog.text


@pytest.mark.usefixtures("two_cpus")
def test_a_cluster_that_was_joined_may_grow(monkeypatch):
    check_fit({"a": {"CPU": 99}}, ClusterConfig(address="auto"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_fit({"a": {"CPU": 99}}, ClusterConfig())


@pytest.mark.parametrize(("log_level", "shown"), [("DEBUG", 1), ("WARNING", 0)])
def test_what_later_versions_of_ray_will_lack_is_shown_to_developers_alone(log_level, shown, monkeypatch):
    monkeypatch.setattr("logging.Logger.setLevel", lambda *_: None)
    with warnings.catch_warnings(record=True) as seen:
        _configure_output(ClusterConfig(log_level=log_level))
        warnings.warn("an option is deprecated", RayDeprecationWarning, stacklevel=1)
    assert len(seen) == shown
