"""The API's backend on Ray Serve: what replicas of the generators and the evaluator answer, and what is made of their errors."""

import asyncio
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from selma_ray.errors import named_line
from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.encoding import PNG, FileFormat
from selma_ray.serving.errors import RequestError, invalid_request, queue_full, timed_out, unavailable
from selma_ray.serving.requests import ImageRequest

__all__ = ["Deployments"]

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 2  # before anything was measured
_ANSWERS_REMEMBERED = 15
_STATS_TIMEOUT_S = 5.0
_ATTEMPTS = 3
_WAIT_FOR_ROOM_S = 0.2


class Deployments:
    """The API's backend: handles of the generator and the evaluator, with a limit on time.

    Drawing and scoring depend on their arguments alone, so what dies with a replica is asked of another one.
    """

    def __init__(
        self, generators: Mapping[str, DeploymentHandle], evaluator: DeploymentHandle | None, timeout_s: float
    ) -> None:
        self._generators = generators
        self._evaluator = evaluator
        self._timeout_s = timeout_s
        self._answered_s: dict[str, deque[float]] = {}
        self._warming = False

    async def warm_up(self, requests: Mapping[str, ImageRequest]) -> None:
        """Draw one image by each run's generator, so that the first client finds everything connected; until then it is not ready."""
        self._warming = True
        for request in requests.values():
            try:
                await self.generate([request], PNG)
            except (
                Exception
            ) as error:  # a scheduler that takes no single step, or a filter: it is connected all the same
                logger.info("warming up failed: %s", named_line(error))
        self._warming = False

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        """Return one encoded image a request."""
        generator = self._generator_of(requests)
        return await self._answer(lambda: generator.generate.remote(requests, file_format), "generator")

    async def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        """Yield previews and finished images as they come."""
        response = self._generator_of(requests).options(stream=True).stream.remote(requests, file_format)
        deadline_s = time.monotonic() + self._timeout_s
        arriving = aiter(response)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(anext(arriving), deadline_s - time.monotonic())
                except StopAsyncIteration:
                    return
        except TimeoutError:
            raise timed_out(self._timeout_s) from None
        except BackPressureError:
            raise queue_full(self._retry_after_s("generator")) from None
        except (RayError, RayServeException, RequestError) as error:
            raise _refusal(error, "generator") from None
        finally:
            # Nothing happens where it has ended; where the client has gone, its slots are freed.
            response.cancel()

    async def score(
        self,
        prompt: str,
        images: Sequence[bytes],
        metrics: Sequence[str],
        questions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return scores of encoded images, and the judge's answers."""
        evaluator = self._evaluator
        if evaluator is None:
            raise invalid_request(
                "scores are not served here; set evaluator_replicas", code="scores_not_served", status=404
            )
        return await self._answer(lambda: evaluator.score.remote(prompt, images, metrics, questions), "evaluator")

    async def check_ready(self) -> None:
        """Raise RequestError (503) unless a generator replica of each run answers, and has answered."""
        answering = {each["run"] for each in await self.generator_stats()}
        if self._warming or answering != self._generators.keys():
            raise unavailable("generator")

    async def generator_stats(self) -> list[dict[str, Any]]:
        """Return the counts of each generator replica, with the run that it draws for; those that do not answer are left out."""
        nested = await asyncio.gather(*(self._stats_of(run) for run in self._generators))
        return [stats for run_stats in nested for stats in run_stats]

    async def _stats_of(self, run: str) -> list[dict[str, Any]]:
        try:
            # Not a request: full queues do not hold it back.
            answers = (
                await self._generators[run]
                .broadcast("stats")
                .results_async(timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
            )
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("the generators do not answer: %s", named_line(error))
            return []
        return [{**answer, "run": run} for answer in answers if isinstance(answer, dict)]

    def _generator_of(self, requests: Sequence[ImageRequest]) -> DeploymentHandle:
        """Return the generators of the run that a call's requests are of."""
        return self._generators[requests[0].run if requests else ""]

    async def _answer(self, ask: Callable[[], Any], what: str) -> Any:
        """Await a replica's answer; when time is up or the client goes away, the replica is told to stop."""
        started_s = time.monotonic()
        deadline_s = started_s + self._timeout_s
        deaths = 0
        while True:
            response = ask()
            try:
                answer = await asyncio.wait_for(response, deadline_s - time.monotonic())
                answered_s = self._answered_s.setdefault(what, deque(maxlen=_ANSWERS_REMEMBERED))
                answered_s.append(time.monotonic() - started_s)
                return answer
            except TimeoutError:
                response.cancel()
                raise timed_out(self._timeout_s) from None
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError as error:
                raise _refusal(error, what) from None
            except RayActorError as error:
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise _refusal(error, what) from None
                logger.warning("a replica of the %s died with a request, which is asked again", what)
            except BackPressureError:
                if not deaths:
                    raise queue_full(self._retry_after_s(what)) from None
                await asyncio.sleep(_WAIT_FOR_ROOM_S)  # it had been accepted before its replica died
            except (RayError, RayServeException, RequestError) as error:
                raise _refusal(error, what) from None

    def _retry_after_s(self, what: str) -> int:
        """Return the seconds that answers have taken lately: whoever comes back then finds other requests before it."""
        answered_s = self._answered_s.get(what)
        return math.ceil(statistics.median(answered_s)) if answered_s else _RETRY_AFTER_S


def _refusal(error: Exception, what: str) -> Exception:
    """Return how an error of a replica is answered; a fault of ours stays what it is."""
    if isinstance(error, RequestError):
        # Ray raises a class of its own that holds the replica's error as `cause`.
        return getattr(error, "cause", error)
    if isinstance(error, RayTaskError):
        return error
    logger.warning("the %s did not answer: %s", what, type(error).__name__)
    return unavailable(what)
