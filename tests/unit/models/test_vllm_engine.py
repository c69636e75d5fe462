from types import SimpleNamespace
from typing import Any

import pytest

from selma_ray.models.vllm_engine import engine_environment


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"num_cpus": 2.0, "num_gpus": 0.0, "tensor_parallel_size": 1, "kv_cache_gb": 3} | changes)


def test_an_engine_on_the_cpu_gets_its_cache_its_threads_and_one_process() -> None:
    environment = engine_environment(settings())
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("changes", [{"tensor_parallel_size": 2}, {"num_gpus": 1.0}])
def test_an_engine_over_several_devices_or_on_a_gpu_has_workers_of_its_own(changes: Any) -> None:
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment(settings(**changes))
