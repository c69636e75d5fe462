"""How much memory the GPUs of a cluster have, asked of their nodes without taking a GPU."""

import logging
import subprocess

from selma_ray.cluster.config import ClusterConfig

__all__ = ["gpu_memories_mib", "smallest_gpu_bytes"]

logger = logging.getLogger(__name__)

_ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 60.0
_MIB = 1024**2


def smallest_gpu_bytes(config: ClusterConfig) -> float | None:
    """Return the memory of the smallest GPU of the connected cluster, or what `cluster.gpu_memory_gb` says; None where nobody knows.

    Nodes that an autoscaler has not started yet cannot be asked.
    """
    if config.gpu_memory_gb is not None:
        return config.gpu_memory_gb * 1e9
    if config.logical_gpus:
        return None
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    ask = ray.remote(num_cpus=0, max_retries=0)(gpu_memories_mib)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote() for node in nodes
    ]
    try:
        answers = ray.get(asked, timeout=_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        logger.warning("nodes with GPUs do not say how much memory these have: %s", error)
        return None
    found = [memory_mib for answer in answers for memory_mib in answer]
    return min(found) * _MIB if found else None


def gpu_memories_mib() -> list[float]:
    """Return the memory of each GPU of this machine by NVIDIA's tool; none where it is missing or fails."""
    try:
        answer = subprocess.run(_ASK, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
        return [float(line) for line in answer.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
