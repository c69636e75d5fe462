"""Whether the nodes of a cluster see the run's folder as the driver does: asked of each of them before work is paid for."""

import logging
import time
import uuid
from typing import Any

from selma_ray.errors import StorageError, first_line
from selma_ray.storage import RunFolder

__all__ = ["check_shared"]

logger = logging.getLogger(__name__)

_PROBES = "probes"
_PATIENCE_S = 10.0  # network filesystems show a new file a little later
_TIMEOUT_S = 120.0


def check_shared(folder: RunFolder) -> None:
    """Raise StorageError where a node of the connected cluster does not see what the driver writes, or the other way round.

    Nodes that an autoscaler starts later are asked before the next stage.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) == 1:
        return
    marker = uuid.uuid4().hex
    folder.write_bytes(b"driver", _PROBES, marker)
    ask = ray.remote(num_cpus=0, max_retries=0)(_answer)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            folder, marker, node
        )
        for node in nodes
    }
    try:
        for node, answer in asked.items():
            seen = _answered(folder, nodes[node], answer)
            if seen is not None:
                _check_answer(folder, marker, node, nodes[node], seen)
    finally:
        folder.delete(_PROBES)


def _answered(folder: RunFolder, address: str, answer: Any) -> bool | None:
    """Return what a node answered, or None where it has left the cluster: Ray lists a dead node for some seconds.

    Raises StorageError where it neither answers nor leaves.
    """
    import ray
    from ray import exceptions

    try:
        return ray.get(answer, timeout=_TIMEOUT_S)
    except (
        exceptions.NodeDiedError, exceptions.LocalRayletDiedError, exceptions.TaskUnschedulableError, exceptions.WorkerCrashedError,
    ) as error:  # fmt: skip
        logger.warning(
            "node %s has left the cluster and is not asked whether it sees %s: %s",
            address,
            folder.uri,
            first_line(error),
        )
        return None
    except exceptions.GetTimeoutError:
        raise StorageError(
            f"node {address} did not say within {_TIMEOUT_S:g} s whether it sees run_dir {folder.uri}; end that node, or look at the "
            "storage there, and run the same command again"
        ) from None


def _answer(folder: RunFolder, marker: str, node: str) -> bool:
    """Tell whether this node sees the driver's marker, and leave one of its own."""
    seen = _appears(folder, marker)
    folder.write_bytes(b"node", _PROBES, f"{marker}-{node}")
    return seen


def _check_answer(folder: RunFolder, marker: str, node: str, address: str, seen: bool) -> None:
    if not seen:
        problem = f"node {address} does not see what the driver writes there"
    elif not _appears(folder, f"{marker}-{node}"):
        problem = f"the driver does not see what node {address} writes there"
    else:
        return
    raise StorageError(
        f"run_dir {folder.uri} must be storage that all nodes share: {problem}; mount one filesystem there on every node, or set run_dir "
        "to s3://… or gs://…"
    )


def _appears(folder: RunFolder, marker: str) -> bool:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not folder.exists(_PROBES, marker):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.5)
    return True
