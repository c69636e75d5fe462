import json
import warnings
from typing import Any

import pytest
from ray.util.annotations import RayDeprecationWarning

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import _configure_output, _not_of_job, _start_errors
from selma_ray.errors import ClusterError


@pytest.mark.parametrize(("log_level", "shown"), [("DEBUG", 1), ("WARNING", 0)])
def test_what_later_versions_of_ray_will_lack_is_shown_to_developers_alone(
    log_level: Any, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.setLevel", lambda *_: None)
    with warnings.catch_warnings(record=True) as seen:
        _configure_output(ClusterConfig(log_level=log_level))
        warnings.warn("an option is deprecated", RayDeprecationWarning, stacklevel=1)
    assert len(seen) == shown


@pytest.mark.parametrize(
    ("submitted", "left"),
    [
        ({}, {"A", "B"}),
        ({"runtime_env": {"env_vars": {"A": "1"}, "working_dir": "gcs://x"}}, {"B"}),
        ({"runtime_env": None}, {"A", "B"}),
        ({"runtime_env": {"env_vars": None}}, {"A", "B"}),
    ],
)
def test_what_a_submitted_job_sets_itself_is_not_set_again(
    submitted: Any, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    assert set(_not_of_job({"A": "a", "B": "b"})) == left


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            ConnectionError("Failed to connect\nmore"),
            r"^no Ray answers at 10.0.0.1:6379 \(Failed to connect\); start it",
        ),
        (
            Exception("The current node timed out during startup. This"),
            r"^Ray did not start in time: .* run the same command",
        ),
    ],
)
def test_a_ray_that_does_not_come_up_is_one_line(raised: Exception, line: str) -> None:
    with pytest.raises(ClusterError, match=line), _start_errors("10.0.0.1:6379"):
        raise raised


def test_other_errors_of_a_start_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="object_store"), _start_errors("local"):
        raise ValueError("object_store_memory")
