"""Where a role computes: its resources decide, and nothing else asks whether there is a GPU."""

import os
from typing import TYPE_CHECKING, Any

from selma_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["LOGICAL_GPUS", "device_of", "see_own_gpus", "task_options", "uses_cuda"]

LOGICAL_GPUS = "SELMA_RAY_LOGICAL_GPUS"
"""Environment variable of all processes of a cluster whose GPUs exist for scheduling alone (cluster.logical_gpus)."""


def uses_cuda(num_gpus: float) -> bool:
    """Tell whether a role with `num_gpus` computes on a card; GPUs that exist for scheduling alone are none."""
    return num_gpus > 0 and not os.environ.get(LOGICAL_GPUS)


def device_of(num_gpus: float, key: str) -> "torch.device":
    """Return CUDA for a role with GPUs and the CPU for one without; `key` is the recipe's key that says which.

    Raises ConfigError where a role has GPUs and torch finds none.
    """
    import torch

    cuda = uses_cuda(num_gpus)
    if cuda and not torch.cuda.is_available():
        raise ConfigError(
            f"{key} is {num_gpus:g}, but torch sees no CUDA device on this node; set {key} to 0, or run where there is a GPU, with a "
            "CUDA build of torch"
        )
    return torch.device("cuda" if cuda else "cpu")


def see_own_gpus(num_gpus: float) -> None:
    """Hide all GPUs from a worker's process that was given none: Ray leaves those of its node in sight.

    Called first of all in a process that Ray started, as libraries that find a GPU use it; once CUDA has started it is too late.
    """
    if not num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def task_options(num_gpus: float) -> dict[str, Any]:
    """Return the Ray options of a task with `num_gpus`, which never shares a process with a task without any.

    Ray gives processes from task to task, and one that GPUs were hidden from does not see them again.
    """
    if not num_gpus:
        return {"num_gpus": 0}
    return {"num_gpus": num_gpus, "runtime_env": {"env_vars": {"SELMA_RAY_GPU_TASK": "1"}}}
