"""Waiting that says for what: a cluster that grows on demand may take minutes to start a node, or never have one of a kind."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import Demand, available_resources, is_local
from selma_ray.progress import Progress, Report

__all__ = ["announced_waits", "missing_demands"]

logger = logging.getLogger(__name__)

_FIRST_AFTER_S = 25.0
_LONGEST_PAUSE_S = 600.0


def missing_demands(demands: Sequence[Demand], config: ClusterConfig) -> list[str]:
    """Return in words what the connected cluster does not have now, such as `role=llm, 1 GPU (prompts.llm.min_replicas)`."""
    missing = []
    for demand in demands:
        there = available_resources(demand.role, config)
        short = [
            f"{amount:g} {name}" for name, amount in demand.resources.items() if amount and there.get(name, 0) < amount
        ]
        if short:
            role = f"role={demand.role}, " if config.use_labels else ""
            missing.append(f"{role}{', '.join(short)} ({demand.key})")
    return missing


@contextmanager
def announced_waits(
    demands: Sequence[Demand],
    config: ClusterConfig,
    stage: str,
    report: Report,
    first_after_s: float = _FIRST_AFTER_S,
) -> Iterator[None]:
    """Tell from a thread, while the block runs, what a cluster that was joined lacks: after half a minute, then with growing pauses."""
    if is_local(config):
        yield  # what a local cluster lacks is refused before
        return
    ended = threading.Event()

    def watch() -> None:
        pause_s = first_after_s
        while not ended.wait(pause_s):
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                missing = missing_demands(demands, config)
            except Exception:
                logger.debug("the cluster's resources could not be read", exc_info=True)
                continue
            for each in missing:
                words = f"waiting for {each}: no node has it yet"
                logger.warning("%s %s", stage, words)
                report(Progress(stage, 0, 0, words))

    thread = threading.Thread(target=watch, name="announce-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
