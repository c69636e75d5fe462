"""What a serving configuration refuses, and what importing it costs."""

import pickle
import subprocess
import sys

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.serving.config import ServingConfig, is_loopback
from selma_ray.serving.errors import queue_full


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "service.example.com"])
def test_a_host_beyond_loopback_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="api_keys_file must name a file"):
        validate(ServingConfig, {"host": host}, "recipe")
    validate(ServingConfig, {"host": host, "api_keys_file": "keys"}, "recipe")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "[::1]", "::ffff:127.0.0.1"])
def test_loopback_hosts(host: str) -> None:
    assert is_loopback(host)
    validate(ServingConfig, {"host": host}, "recipe")


def test_the_largest_request_must_fit_the_queue() -> None:
    with pytest.raises(ConfigError, match="max_images"):
        validate(ServingConfig, {"max_images": 13, "max_batch_size": 8, "max_queued_requests": 4}, "recipe")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fixed_rows": 2, "cache_interval": 3}, "fixed_rows must be left out where cache_interval is above 1"),
        ({"max_steps": 7}, "max_steps must be at least sampling.steps"),
        ({"max_guidance_scale": 1, "sampling": {"guidance_scale": 2}}, "max_guidance_scale must be at least"),
        ({"max_size_px": 512, "sampling": {"width_px": 1024}}, "max_size_px must be at least sampling.width_px"),
    ],
)
def test_what_a_request_gets_by_default_must_be_within_the_bounds(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ServingConfig, config, "recipe")


def test_the_configuration_loads_no_engine() -> None:
    code = (
        "import sys, selma_ray.serving.config\n"
        "print([name for name in ('torch', 'ray', 'diffusers', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_refusals_travel_between_replicas() -> None:
    travelled = pickle.loads(pickle.dumps(queue_full(retry_after_s=3)))
    assert (travelled.status, travelled.code, travelled.retry_after_s) == (429, "queue_full", 3)
    assert str(travelled) == str(queue_full(3))


def test_sizes_that_a_model_was_not_made_for_are_off_by_default() -> None:
    sampling = {"width_px": 64, "height_px": 48}
    assert ServingConfig.model_validate({"sampling": sampling}).longest_side_px == 96
    assert ServingConfig.model_validate({"sampling": sampling, "max_size_px": 512}).longest_side_px == 512
