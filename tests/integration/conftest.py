"""One Ray for all integration tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Start Ray with four logical CPUs, once."""
    import ray

    connect(ClusterConfig(num_cpus=4, object_store_memory_gb=0.5))
    yield
    ray.shutdown()
