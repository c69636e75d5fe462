"""What a replica of the API has in common with the others, where there are any."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from selma_ray.errors import named_line
from selma_ray.serving.metrics import Metrics, summed
from selma_ray.serving.shared import State

__all__ = ["Peers"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peers:
    """State, and what must be the same in all of them; alone, a replica makes it up."""

    state: State
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    """What links are signed with."""
    started_s: int = field(default_factory=lambda: int(time.time()))
    """When the service was started, in seconds since 1970."""
    metrics: Metrics = field(default_factory=Metrics)
    """This replica's own counts."""
    all_expositions: Callable[[], Awaitable[Sequence[bytes]]] | None = None
    """Asks every replica, this one too, for its counts; default: there is no other."""

    async def exposition(self) -> bytes:
        """Return the counts of all replicas as one, in Prometheus' text format; of this one alone while others do not answer."""
        if self.all_expositions is None:
            return self.metrics.exposition()
        try:
            return summed(await self.all_expositions())
        except Exception as error:
            logger.warning("the other replicas' counts are not known: %s", named_line(error))
            return self.metrics.exposition()
