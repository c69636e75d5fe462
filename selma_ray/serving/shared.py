"""What the replicas of the API have in common: how often keys may be used, answers that may be repeated, images behind links.

A single replica keeps it to itself; several ask one replica that keeps it for all of them, so that a client gets the same answer
whichever of them it reaches. What that replica held is lost with it: limits are whole again, links end, answers are not repeated.
"""

from collections.abc import Sequence
from typing import Protocol

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.guards import Message
from selma_ray.serving.idempotency import Answers, Claim
from selma_ray.serving.keys import ApiKey, Limits, Taken
from selma_ray.serving.links import ImageStore, StoredImage

__all__ = ["LocalState", "State"]


class State(Protocol):
    """What the API asks of it."""

    async def take(self, digest: bytes) -> Taken | None:
        """Count a use of a key, by its digest; None where it has no limit."""
        ...

    async def claim(self, name: bytes, body_digest: bytes) -> Claim:
        """Tell what is to be answered to a request that may have come before."""
        ...

    async def keep_answer(self, name: bytes, messages: Sequence[Message]) -> None:
        """Keep the answer to what was claimed."""
        ...

    async def release(self, name: bytes) -> None:
        """Give back a claim without an answer that is to be kept."""
        ...

    async def keep_image(self, image: StoredImage) -> None:
        """Keep an image behind a link."""
        ...

    async def image(self, name: str) -> StoredImage | None:
        """Return an image behind a link; None once it is kept no longer."""
        ...


class LocalState:
    """All of it in this process; where there are several API replicas, Ray Serve deploys it apart."""

    def __init__(self, config: ServingConfig, keys: Sequence[ApiKey], claims_end_after_s: float | None = None) -> None:
        self._limits = Limits(keys)
        self._answers = Answers(claims_end_after_s=claims_end_after_s)
        self._images = ImageStore(int(config.url_store_mb * 1e6))

    async def take(self, digest: bytes) -> Taken | None:
        """Count a use of a key, by its digest; None where it has no limit."""
        return self._limits.take(digest)

    async def claim(self, name: bytes, body_digest: bytes) -> Claim:
        """Tell what is to be answered to a request that may have come before."""
        return await self._answers.claim(name, body_digest)

    async def keep_answer(self, name: bytes, messages: Sequence[Message]) -> None:
        """Keep the answer to what was claimed."""
        self._answers.keep(name, messages)

    async def release(self, name: bytes) -> None:
        """Give back a claim without an answer that is to be kept."""
        self._answers.release(name)

    async def keep_image(self, image: StoredImage) -> None:
        """Keep an image behind a link; raises RequestError (413) for one that the store cannot hold."""
        self._images.keep(image)

    async def image(self, name: str) -> StoredImage | None:
        """Return an image behind a link; None once it is kept no longer."""
        return self._images.get(name)
