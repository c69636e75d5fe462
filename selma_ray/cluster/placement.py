"""What each role may take from the cluster, and where it is placed."""

import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selma_ray.cluster.config import ClusterConfig, Role
from selma_ray.errors import ConfigError

__all__ = [
    "Demand",
    "available_resources",
    "beside_driver",
    "check_fit",
    "is_local",
    "role_options",
    "shared_resources",
    "wait_until_free",
]

logger = logging.getLogger(__name__)

_FREE_TIMEOUT_S = 120.0
_POOLS_END_S = 10.0
_POOL_CLASS = "MapWorker("
_POLL_S = 0.2


@dataclass(frozen=True)
class Demand:
    """The least that a part of a stage takes of the cluster, by the recipe's key that says so."""

    key: str
    role: Role
    resources: Mapping[str, float]
    """CPU and GPU."""


def is_local(config: ClusterConfig) -> bool:
    """Tell whether the run starts a cluster of its own on this machine; one that is joined may grow on demand."""
    return not (config.address or os.environ.get("RAY_ADDRESS"))


def available_resources(role: Role, config: ClusterConfig) -> Mapping[str, float]:
    """Return what the connected cluster has for a role now: all of it, or with labels that of the nodes that bear the role's."""
    import ray

    if not config.use_labels:
        return ray.cluster_resources()
    totals = Counter[str]()
    for node in ray.nodes():
        if node["Alive"] and node.get("Labels", {}).get("role") == role:
            totals.update(node["Resources"])
    return totals


def shared_resources(*parts: Mapping[str, float]) -> dict[str, float]:
    """Return what one process takes that does the work of several parts in turn: of each resource the most that a part takes.

    Never their sum: Ray refuses 1.25 GPUs, and the parts do not work at the same time.
    """
    return {
        name: max(part.get(name, 0) for part in parts) for name in dict.fromkeys(key for part in parts for key in part)
    }


def check_fit(
    demands: Sequence[Demand], config: ClusterConfig, *, take_turns: bool = True, quiet: bool = False
) -> bool:
    """Tell whether all parts of a stage fit a local cluster at once; one that is joined may grow, and fits.

    Warns of parts that take turns unless `quiet`. Raises ConfigError where a part alone needs more than there is, or where parts that
    cannot `take_turns` do not fit together: they would wait for ever.
    """
    if not is_local(config):
        return True
    pools: dict[str, list[Demand]] = {}
    for demand in demands:
        pools.setdefault(demand.role if config.use_labels else "", []).append(demand)
    fits = [_fits_pool(sharing, config, take_turns, quiet) for sharing in pools.values()]  # each warns of its own
    return all(fits)


def _fits_pool(demands: Sequence[Demand], config: ClusterConfig, take_turns: bool, quiet: bool) -> bool:
    role = demands[0].role
    available = available_resources(role, config)
    if config.use_labels and not available:
        raise ConfigError(
            f"cluster.use_labels is true, but no node bears the label role={role}, which {demands[0].key} needs; set it to false on one "
            "machine, or start nodes with that label"
        )
    fits = True
    for resource in ("CPU", "GPU"):
        there = available.get(resource, 0)
        needed = {demand.key: demand.resources.get(resource, 0) for demand in demands}
        for key, amount in needed.items():
            if amount > there:
                raise ConfigError(
                    f"{key} must fit the local cluster's {there:g} {resource}, needs {amount:g}; lower it"
                )
        if sum(needed.values()) <= there:
            continue
        parts = " and ".join(f"{key} needs {amount:g}" for key, amount in needed.items())
        if not take_turns:
            raise ConfigError(
                f"{parts}, the local cluster has {there:g} {resource}, and they work at once; lower one of them"
            )
        if not quiet:
            logger.warning("%s, the local cluster has %g %s: they run one after the other", parts, there, resource)
        fits = False
    return fits


def wait_until_free(demands: Sequence[Demand], config: ClusterConfig, timeout_s: float = _FREE_TIMEOUT_S) -> None:
    """Wait until a local cluster has what `demands` need free: Ray ends the processes of a finished stage a little later.

    Raises ConfigError where something else keeps it. Meant for between stages: pools of this process that do not end are ended.
    """
    import ray

    if not is_local(config):
        return
    needed = Counter[str]()
    for demand in demands:
        needed.update(demand.resources)
    started_s = time.monotonic()
    pools_end_s, deadline_s = started_s + _POOLS_END_S, started_s + timeout_s
    while True:
        free = ray.available_resources()
        missing = {key for key, amount in needed.items() if free.get(key, 0) < amount}
        if not missing:
            return
        if time.monotonic() > deadline_s:
            names = " and ".join(sorted(missing))
            raise ConfigError(
                f"{demands[0].key} needs {names}, which something else on this cluster kept for {timeout_s:g} s; end it and run the same "
                "command again"
            )
        if time.monotonic() > pools_end_s:
            _end_pools()
            pools_end_s = deadline_s
        gc.collect()  # an actor lives while a handle does, and handles of a finished pool stay in cycles until Python looks for them
        time.sleep(_POLL_S)


def _end_pools() -> None:
    """Kill the actors of Ray Data's pools: one whose stream ended before its last answer was taken may never be told to end."""
    from ray._private.state import actors

    for actor in actors(actor_state_name="ALIVE").values():
        if actor["ActorClassName"].startswith(_POOL_CLASS):
            logger.info("%s did not end by itself and is ended", actor["ActorClassName"])
            _kill(actor["ActorID"])


def _kill(actor_id: str) -> None:
    """Kill an actor whose handle this process may no longer have, which `ray.kill` asks for."""
    import ray

    ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID(bytes.fromhex(actor_id)), True)


def role_options(role: Role, config: ClusterConfig) -> dict[str, Any]:
    """Return the Ray options that place a task or actor of `role`; empty unless the recipe uses labels."""
    return {"label_selector": {"role": role}} if config.use_labels else {}


def beside_driver() -> dict[str, Any]:
    """Return the Ray options of a light actor that must live as long as the driver: the driver's node, and no CPU.

    Elsewhere it may end with a node that the autoscaler or a cloud takes back.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
