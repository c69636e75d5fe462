"""How many threads a replica computes with."""

import os

__all__ = ["use_threads"]


def use_threads(num_threads: int | None) -> None:
    """Let torch use `num_threads`, or every core of the node: Ray gives a replica with less than a CPU one thread."""
    import torch

    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
