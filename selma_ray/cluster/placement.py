"""What each role may take from the cluster, and where it is placed."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from selma_ray.cluster.config import ClusterConfig, Role
from selma_ray.errors import ConfigError

__all__ = ["beside_driver", "check_fit", "role_options"]

logger = logging.getLogger(__name__)


def check_fit(demands: Mapping[str, Mapping[str, float]], config: ClusterConfig) -> None:
    """Raise ConfigError where a stage needs more than a local cluster has; warn where two that run at once do so together.

    `demands` names the recipe's key of each stage and its least resources. A cluster that was joined may grow on demand.
    """
    if config.address or os.environ.get("RAY_ADDRESS"):
        return
    import ray

    available = ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        there, needed = available.get(resource, 0), {key: demand.get(resource, 0) for key, demand in demands.items()}
        for key, amount in needed.items():
            if amount > there:
                raise ConfigError(
                    f"{key} must fit the local cluster's {there:g} {resource}, needs {amount:g}; lower it"
                )
        if sum(needed.values()) > there:
            parts = " and ".join(f"{key} needs {amount:g}" for key, amount in needed.items())
            logger.warning("%s, the local cluster has %g %s: they run one after the other", parts, there, resource)


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
