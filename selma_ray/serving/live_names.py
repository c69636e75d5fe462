"""The names that can be asked for now: generators are given more adapters while they run."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from selma_ray.errors import named_line
from selma_ray.serving.backend import Backend
from selma_ray.serving.catalogue import Catalogue
from selma_ray.serving.errors import RequestError

__all__ = ["LiveNames"]

Read = TypeVar("Read")

logger = logging.getLogger(__name__)

_LOOKED_UP_EVERY_S = 1.0
_TIMEOUT_S = 1.0


class LiveNames:
    """The names that a service was started with, and those of adapters that every generator of a run has been given since."""

    def __init__(self, catalogue: Catalogue, backend: Backend, now_s: Callable[[], float] = time.monotonic) -> None:
        self._catalogue = catalogue
        self._backend = backend
        self._now_s = now_s
        self._looked_up_s: float | None = None

    async def known(self) -> Catalogue:
        """Return the names, looked up unless that was a moment ago; while generators do not answer, those known before."""
        now_s = self._now_s()
        if self._looked_up_s is None or now_s - self._looked_up_s >= _LOOKED_UP_EVERY_S:
            self._looked_up_s = now_s
            await self._look_up()
        return self._catalogue

    async def read(self, reading: Callable[[Catalogue], Read]) -> Read:
        """Return what is read with the names; where one is not known they are looked up first. Raises RequestError as `reading` does."""
        try:
            return reading(self._catalogue)
        except RequestError as error:
            if error.code != "model_not_found":
                raise
        return reading(await self.known())

    async def _look_up(self) -> None:
        try:
            stats = await asyncio.wait_for(self._backend.generator_stats(), _TIMEOUT_S)
        except Exception as error:
            # The list of models is answered whatever state the generators are in.
            logger.info("the generators' models are not known: %s", named_line(error))
            return
        for run in self._catalogue.entries:
            replicas = [each["experts"] for each in stats if "experts" in each and each.get("run", "") == run]
            if replicas:
                everywhere = set.intersection(*map(set, replicas))
                experts = tuple(name for name in replicas[0] if name in everywhere)
                self._catalogue = self._catalogue.with_experts(run, experts)
