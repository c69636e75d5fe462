"""The service on Ray Serve: an API replica before the generator's and the evaluator's."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from selma_ray.cluster import ClusterConfig, role_options
from selma_ray.models.config import ModelConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import RequestError, invalid_request, queue_full, timed_out, unavailable
from selma_ray.serving.evaluator import Evaluator, Scorer
from selma_ray.serving.generator import Generator
from selma_ray.serving.keys import read_key_digests
from selma_ray.serving.requests import ImageRequest

__all__ = ["Deployments", "application"]

logger = logging.getLogger(__name__)

_ONGOING_API_REQUESTS = 1000


def application(
    model: ModelConfig,
    model_name: str,
    config: ServingConfig,
    cluster: ClusterConfig,
    open_scorer: Callable[[], Scorer],
) -> serve.Application:
    """Return the Ray Serve application that serves `model` under `model_name`.

    `open_scorer` opens the judge on the evaluator's replicas. Raises ConfigError where the keys' file is unusable.
    """
    digests = read_key_digests(config.api_keys_file) if config.api_keys_file else ()
    place = {"num_cpus": config.num_cpus, **role_options("serve", cluster)}
    generator = serve.deployment(
        Generator,
        name="generator",
        num_replicas=config.generator_replicas,
        # The engine's own queue refuses what is too much; Ray Serve must not hold requests back before it.
        max_ongoing_requests=config.max_batch_size + config.max_queued_requests + 1,
        ray_actor_options={**place, "num_gpus": config.num_gpus},
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.request_timeout_s,
    ).bind(model, config)
    evaluator = None
    if config.evaluator_replicas:
        evaluator = serve.deployment(
            Evaluator,
            name="evaluator",
            num_replicas=config.evaluator_replicas,
            max_ongoing_requests=2 * config.judge_batch_size,
            max_queued_requests=config.max_queued_requests,
            ray_actor_options=place,
        ).bind(open_scorer, config)
    api = serve.deployment(
        _Api,
        name="api",
        max_ongoing_requests=_ONGOING_API_REQUESTS,
        ray_actor_options={**place, "num_cpus": 0},
    )
    return api.bind(config, model_name, digests, generator, evaluator)


@serve.ingress()
class _Api:
    """The replica that speaks HTTP."""

    def __init__(
        self,
        config: ServingConfig,
        model_name: str,
        key_digests: Sequence[bytes],
        generator: DeploymentHandle,
        evaluator: DeploymentHandle | None,
    ) -> None:
        self._app = build_app(
            Deployments(generator, evaluator, config.request_timeout_s), config, model_name, key_digests
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


class Deployments:
    """The API's backend: handles of the generator and the evaluator, with a limit on time."""

    def __init__(self, generator: DeploymentHandle, evaluator: DeploymentHandle | None, timeout_s: float) -> None:
        self._generator = generator
        self._evaluator = evaluator
        self._timeout_s = timeout_s

    async def generate(self, requests: Sequence[ImageRequest], output_format: OutputFormat) -> list[bytes]:
        """Return one encoded image a request."""
        return await self._answer(self._generator.generate.remote(requests, output_format), "generator")

    async def score(self, prompt: str, image: bytes) -> dict[str, Any]:
        """Return the score of an encoded image."""
        if self._evaluator is None:
            raise invalid_request(
                "scores are not served here; set evaluator_replicas", code="scores_not_served", status=404
            )
        return await self._answer(self._evaluator.score.remote(prompt, image), "evaluator")

    async def _answer(self, response: DeploymentResponse, what: str) -> Any:
        """Await a replica's answer; when time is up or the client goes away, the replica is told to stop."""
        try:
            return await asyncio.wait_for(response, self._timeout_s)
        except TimeoutError:
            response.cancel()
            raise timed_out(self._timeout_s) from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise queue_full(retry_after_s=2) from None
        except RequestError as error:
            # Ray raises a class of its own that holds the replica's error as `cause`.
            raise getattr(error, "cause", error) from None
        except RayTaskError:
            raise
        except (RayError, RayServeException, DeploymentUnavailableError) as error:
            logger.warning("the %s did not answer: %s", what, type(error).__name__)
            raise unavailable(what) from None
