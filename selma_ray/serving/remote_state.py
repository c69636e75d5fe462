"""The state that several replicas of the API share, asked of the replica that holds it."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from selma_ray.errors import named_line
from selma_ray.serving.errors import RequestError, unavailable
from selma_ray.serving.guards import Message
from selma_ray.serving.idempotency import Claim
from selma_ray.serving.keys import Taken
from selma_ray.serving.links import StoredImage

__all__ = ["RemoteState"]

Answered = TypeVar("Answered")

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class RemoteState:
    """A LocalState in another replica. While it does not answer, requests pass unlimited and are not repeated, and links wait."""

    def __init__(self, handle: DeploymentHandle, wait_s: float) -> None:
        self._handle = handle
        self._wait_s = wait_s

    async def take(self, digest: bytes) -> Taken | None:
        """Count a use of a key, by its digest; None where it has no limit."""
        try:
            return await _answer(self._handle.take.remote(digest))
        except _NoAnswerError:
            return None

    async def claim(self, name: bytes, body_digest: bytes) -> Claim:
        """Tell what is to be answered to a request that may have come before; waits while the first one is being answered."""
        try:
            return await _answer(self._handle.claim.remote(name, body_digest), self._wait_s)
        except _NoAnswerError:
            return Claim("own")

    async def keep_answer(self, name: bytes, messages: Sequence[Message]) -> None:
        """Keep the answer to what was claimed."""
        await _told(self._handle.keep_answer.remote(name, messages))

    async def release(self, name: bytes) -> None:
        """Give back a claim without an answer that is to be kept."""
        await _told(self._handle.release.remote(name))

    async def keep_image(self, image: StoredImage) -> None:
        """Keep an image behind a link; raises RequestError: 413 for one that the store cannot hold, 503 where none answers."""
        try:
            await _answer(self._handle.keep_image.remote(image))
        except _NoAnswerError:
            raise unavailable("image store") from None

    async def image(self, name: str) -> StoredImage | None:
        """Return an image behind a link, None once it is kept no longer; raises RequestError (503) where no store answers."""
        try:
            return await _answer(self._handle.image.remote(name))
        except _NoAnswerError:
            raise unavailable("image store") from None


class _NoAnswerError(Exception):
    """The replica that holds the state does not answer."""


async def _told(response: Any) -> None:
    with suppress(_NoAnswerError):  # nothing is repeated then
        await _answer(response)


async def _answer(response: Awaitable[Answered], timeout_s: float = _TIMEOUT_S) -> Answered:
    """Await the state's answer; raises what it refuses with, _NoAnswerError where it does not answer."""
    try:
        return await asyncio.wait_for(response, timeout_s)
    except RequestError as error:
        # Ray raises a class of its own that holds the replica's error as `cause`.
        raise getattr(error, "cause", error) from None
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("the replica with the state of all API replicas does not answer: %s", named_line(error))
        raise _NoAnswerError from None
