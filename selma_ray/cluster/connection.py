"""The connection to Ray; the only caller of ray.init."""

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import ClusterError, first_line

__all__ = ["cluster_memory_bytes", "connect", "cpu_count"]

logger = logging.getLogger(__name__)

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # how `ray job submit` tells a driver its runtime environment

# Idle processes that Ray keeps beside one per CPU: long-lived actors count too, and each short task would start a process anew.
_SPARE_WORKERS = 8


def connect(config: ClusterConfig) -> None:
    """Join or start Ray once in this process; a second call does nothing."""
    if ray.is_initialized():
        return
    quiet = _quiet_libraries()
    if config.logical_gpus:
        quiet["SELMA_RAY_LOGICAL_GPUS"] = "1"  # models.device reads it in every process
    os.environ.update(quiet)
    if "RAY_AUTH_MODE" not in os.environ:  # then Ray guards its ports with a token, and says so at every start
        logging.getLogger("ray._private.authentication").setLevel("ERROR")
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "logging_level": config.log_level,
        "log_to_driver": config.log_level == "DEBUG",
        "runtime_env": {"env_vars": _not_of_job(quiet)},
    }
    if address:
        options["address"] = address
    else:
        options["address"] = "local"  # one of its own, beside any that runs on this machine
        options["num_cpus"] = config.num_cpus
        options["object_store_memory"] = int(config.object_store_memory_gb * 1e9)
        options["include_dashboard"] = False
        num_cpus = config.num_cpus or os.cpu_count() or 1
        options["_system_config"] = {
            "num_workers_soft_limit": num_cpus + _SPARE_WORKERS,
            # Ray warns of four times as many workers, and a few pools on two cores come to that.
            "worker_maximum_startup_concurrency": max(_SPARE_WORKERS, num_cpus),
        }
    with _start_errors(options["address"]):
        ray.init(**options)
    _end_on_sigterm()
    _configure_output(config)


@contextmanager
def _start_errors(address: str) -> Iterator[None]:
    """Turn what Ray raises where it does not come up in time, or is not there, into one line with a remedy."""
    try:
        yield
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({first_line(error)}); start it there, or fix cluster.address or RAY_ADDRESS"
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ClusterError(
            "Ray did not start in time: this machine is too busy, or short of memory; run the same command again when it is not"
        ) from None


def _not_of_job(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a submitted job's own runtime environment does not set: Ray refuses to be told one twice."""
    submitted = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    own = ((submitted.get("runtime_env") or {}).get("env_vars")) or {}
    return {name: value for name, value in variables.items() if name not in own}


def _end_on_sigterm() -> None:
    """Take SIGTERM, by which job managers stop a driver, as an interrupt; Ray's own handler prints a stack and aborts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def cpu_count() -> int:
    """Return the logical CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 1))


def cluster_memory_bytes() -> float:
    """Return the memory of the connected cluster's nodes that Ray gives to tasks and actors."""
    return float(ray.cluster_resources().get("memory", 0.0))


def _configure_output(config: ClusterConfig) -> None:
    from ray.data import DataContext
    from ray.util.annotations import RayDeprecationWarning

    # Ray's version is pinned: what a later one will lack is no news for whoever runs this.
    warnings.filterwarnings("default" if config.log_level == "DEBUG" else "ignore", category=RayDeprecationWarning)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    data = DataContext.get_current()
    data.enable_progress_bars = config.log_level == "DEBUG"
    # A pool grows once every actor is busy; Ray would wait for more tasks than the renderers take at a time.
    data.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    for name in ("ray.data", "ray.serve", "ray.train"):
        # What fails is raised, and shown once; Ray would log it, with its stack, a second time.
        logging.getLogger(name).setLevel(config.log_level if config.log_level == "DEBUG" else "CRITICAL")
    logging.getLogger("vllm").setLevel("DEBUG" if config.log_level == "DEBUG" else "ERROR")


def _quiet_libraries() -> dict[str, str]:
    """Return the environment that keeps libraries' banners out of the output; what the user has set stays."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    return {key: os.environ.get(key, value) for key, value in quiet.items()}
