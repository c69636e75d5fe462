"""The service on Ray Serve: an API replica before the generator's and the evaluator's."""

import asyncio
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.errors import ServingError
from selma_ray.serving.api import build_app
from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.draining import Gate
from selma_ray.serving.encoding import FileFormat
from selma_ray.serving.errors import RequestError, invalid_request, queue_full, timed_out, unavailable
from selma_ray.serving.evaluator import Evaluator, Scorer
from selma_ray.serving.filters import check_safety_checker
from selma_ray.serving.generator import Generator, OpenExperts
from selma_ray.serving.keys import ApiKey, read_keys
from selma_ray.serving.replica_logs import join_serve_logs
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames, ServedModels

__all__ = ["Deployments", "application"]

logger = logging.getLogger(__name__)

_ONGOING_API_REQUESTS = 1000
_BURST = 8  # requests that may arrive at one moment, while a replica with room is looked up for each
_RETRY_AFTER_S = 2  # before anything was measured
_ANSWERS_REMEMBERED = 15
_STATS_TIMEOUT_S = 5.0
_HEALTH_CHECK_PERIOD_S = 5.0
_ATTEMPTS = 3
_WAIT_FOR_ROOM_S = 0.2


def application(
    models: ServedModels,
    config: ServingConfig,
    cluster: ClusterConfig,
    open_scorer: Callable[[], Scorer],
    open_experts: OpenExperts | None = None,
    own_keys: Sequence[ApiKey] = (),
) -> serve.Application:
    """Return the Ray Serve application that serves `models`.

    `open_scorer` opens the judge and models of other scores on the evaluator's replicas, `open_experts` reads the experts
    on the generator's. `own_keys` are accepted beside those of the keys' file, where there is one.
    Raises ConfigError where the keys' file is unusable, or a safety checker is asked of a model without one.
    """
    check_safety_checker(config, models.merged)
    keys = (*read_keys(config.api_keys_file, config.requests_per_minute), *own_keys) if config.api_keys_file else ()
    place = {"num_cpus": config.num_cpus, **role_options("serve", cluster)}
    logging_config = {"log_level": cluster.log_level}
    generator = serve.deployment(
        _GeneratorReplica,
        name="generator",
        # What is beyond the engines' own queues is refused by the handle, at once: a replica that is full is asked no more.
        max_ongoing_requests=config.max_batch_size + config.max_queued_requests,
        max_queued_requests=max(config.max_queued_requests, _BURST),
        ray_actor_options={**place, "num_gpus": config.num_gpus},
        logging_config=logging_config,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        # A replica that is replaced finishes what it has accepted.
        graceful_shutdown_timeout_s=config.request_timeout_s,
        **_replicas(config.generator_replicas, config.max_generator_replicas, config.max_batch_size),
    ).bind(models, config, open_experts)
    evaluator = None
    if config.evaluator_replicas:
        evaluator = serve.deployment(
            _EvaluatorReplica,
            name="evaluator",
            max_ongoing_requests=2 * config.judge_batch_size,
            max_queued_requests=config.max_queued_requests,
            ray_actor_options={**place, "num_gpus": config.evaluator_num_gpus},
            logging_config=logging_config,
            graceful_shutdown_timeout_s=config.request_timeout_s,
            **_replicas(config.evaluator_replicas, config.max_evaluator_replicas, config.judge_batch_size),
        ).bind(open_scorer, config)
    api = serve.deployment(
        _Api,
        name="api",
        max_ongoing_requests=_ONGOING_API_REQUESTS,
        max_queued_requests=_ONGOING_API_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_S),
        ray_actor_options={**place, "num_cpus": 0},
        logging_config=logging_config,
        graceful_shutdown_timeout_s=config.request_timeout_s,
    )
    return api.bind(config, models.names, keys, generator, evaluator)


def _replicas(fewest: int, most: int | None, full_batch: int) -> dict[str, Any]:
    """Return a fixed number of replicas, or bounds between which they follow the queue: each is to have a full batch."""
    if most is None or most == fewest:
        return {"num_replicas": fewest}
    scaling = AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=full_batch)
    return {"autoscaling_config": scaling}


class _GeneratorReplica(Generator):
    """A generator in a process of its own, which it ends when its engine is dead or stuck.

    Ray Serve then starts another one at once, and what this one had accepted is asked of another: of a process that lives,
    Ray Serve would wait for the answers that never come, and its GPU would stay taken.
    """

    def __init__(self, models: ServedModels, config: ServingConfig, open_experts: OpenExperts | None) -> None:
        join_serve_logs()
        super().__init__(models, config, open_experts)

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds."""
        try:
            super().check_health()
        except ServingError as error:
            logger.critical("%s", error)
            os._exit(1)


class _EvaluatorReplica(Evaluator):
    """An evaluator in a process of its own."""

    def __init__(self, open_scorer: Callable[[], Scorer], config: ServingConfig) -> None:
        join_serve_logs()
        super().__init__(open_scorer, config)


@serve.ingress()
class _Api:
    """The replica that speaks HTTP."""

    def __init__(
        self,
        config: ServingConfig,
        names: ModelNames,
        keys: Sequence[ApiKey],
        generator: DeploymentHandle,
        evaluator: DeploymentHandle | None,
    ) -> None:
        join_serve_logs()
        self._gate = Gate()
        backend = Deployments(generator, evaluator, config.request_timeout_s)
        self._app = build_app(backend, config, names, keys, self._gate)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for those in progress; returns how many were cut off after `timeout_s`."""
        return await self._gate.close(timeout_s)


class Deployments:
    """The API's backend: handles of the generator and the evaluator, with a limit on time.

    Drawing and scoring depend on their arguments alone, so what dies with a replica is asked of another one.
    """

    def __init__(self, generator: DeploymentHandle, evaluator: DeploymentHandle | None, timeout_s: float) -> None:
        self._generator = generator
        self._evaluator = evaluator
        self._timeout_s = timeout_s
        self._answered_s: dict[str, deque[float]] = {}

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        """Return one encoded image a request."""
        return await self._answer(lambda: self._generator.generate.remote(requests, file_format), "generator")

    async def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        """Yield previews and finished images as they come."""
        response = self._generator.options(stream=True).stream.remote(requests, file_format)
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
        """Raise RequestError (503) unless a generator replica answers."""
        if not await self.generator_stats():
            raise unavailable("generator")

    async def generator_stats(self) -> list[dict[str, Any]]:
        """Return the counts of each generator replica; those that do not answer are left out."""
        try:
            # Not a request: full queues do not hold it back.
            answers = await self._generator.broadcast("stats").results_async(
                timeout_s=_STATS_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            raise unavailable("generator") from None
        return [answer for answer in answers if isinstance(answer, dict)]

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
