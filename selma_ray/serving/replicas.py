"""What Ray Serve runs in processes of their own. Each loads what it needs itself: the one that speaks HTTP has no torch."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from selma_ray.errors import ServingError
from selma_ray.serving.api import build_app
from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.catalogue import Entry
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.credentials import open_signer
from selma_ray.serving.draining import Gate
from selma_ray.serving.encoding import FileFormat
from selma_ray.serving.evaluator import Evaluator, Scorer
from selma_ray.serving.experts import OpenExperts
from selma_ray.serving.handles import Deployments
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.metrics import Metrics
from selma_ray.serving.peers import Peers
from selma_ray.serving.remote_state import RemoteState
from selma_ray.serving.replica_logs import join_serve_logs
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ServedModels
from selma_ray.serving.shared import LocalState

__all__ = ["API", "ApiReplica", "Common", "EvaluatorReplica", "GeneratorReplica"]

logger = logging.getLogger(__name__)

API = "api"
"""Name of the deployment that speaks HTTP."""

_ANSWER_S = 5.0


class GeneratorReplica:
    """A generator in a process of its own, which it ends when its engine is dead or stuck.

    Ray Serve then starts another one at once, and what this one had accepted is asked of another: of a process that lives,
    Ray Serve would wait for the answers that never come, and its GPU would stay taken.
    """

    def __init__(self, models: ServedModels, config: ServingConfig, open_experts: OpenExperts | None) -> None:
        join_serve_logs()
        from selma_ray.serving.generator import Generator  # loads torch and diffusers, which only this replica needs

        self._generator = Generator(models, config, open_experts)

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        """Return one encoded image a request."""
        return await self._generator.generate(requests, file_format)

    async def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        """Yield previews and finished images as they come."""
        async for drawn in self._generator.stream(requests, file_format):
            yield drawn

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change weights without a restart."""
        await self._generator.reconfigure(user_config)

    def stats(self) -> dict[str, Any]:
        """Return the engine's counts."""
        return self._generator.stats()

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds."""
        try:
            self._generator.check_health()
        except ServingError as error:
            logger.critical("%s", error)
            os._exit(1)


class EvaluatorReplica(Evaluator):
    """An evaluator in a process of its own."""

    def __init__(self, open_scorer: Callable[[], Scorer], config: ServingConfig) -> None:
        join_serve_logs()
        super().__init__(open_scorer, config)


@dataclass(frozen=True)
class Common:
    """What all replicas of the API are given."""

    config: ServingConfig
    entries: Mapping[str, Entry]
    """The runs that are served, the service's own under no name."""
    keys: Sequence[ApiKey]
    secret: bytes
    """What links are signed with."""
    started_s: int


@serve.ingress()
class ApiReplica:
    """The replica that speaks HTTP; `state` is the one that holds what several of them share."""

    def __init__(
        self,
        common: Common,
        generators: Mapping[str, DeploymentHandle],
        evaluator: DeploymentHandle | None,
        state: DeploymentHandle | None,
    ) -> None:
        join_serve_logs()
        config = common.config
        self._gate, self._metrics = Gate(), Metrics()
        self._all: DeploymentHandle | None = None
        backend = Deployments(generators, evaluator, config.request_timeout_s)
        peers = Peers(
            LocalState(config, common.keys) if state is None else RemoteState(state, 2 * config.request_timeout_s),
            common.secret,
            common.started_s,
            self._metrics,
            None if state is None else self._all_expositions,
        )
        others = {run: entry for run, entry in common.entries.items() if run}
        names = common.entries[""].names
        self._app = build_app(
            backend, config, names, common.keys, self._gate, others=others, peers=peers, sign=open_signer(config)
        )
        self._warming = asyncio.get_running_loop().create_task(backend.warm_up(_first_requests(common.entries)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def ready(self) -> None:
        """Return once the first request would find everything connected."""
        await asyncio.shield(self._warming)

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for those in progress; returns how many were cut off after `timeout_s`."""
        return await self._gate.close(timeout_s)

    def exposition(self) -> bytes:
        """Return this replica's own counts."""
        return self._metrics.exposition()

    async def _all_expositions(self) -> Sequence[bytes]:
        if self._all is None:  # a replica is not among those of its own deployment before it has started
            self._all = serve.get_deployment_handle(API, serve.get_replica_context().app_name)
        return await self._all.broadcast("exposition").results_async(timeout_s=_ANSWER_S)


def _first_requests(entries: Mapping[str, Entry]) -> dict[str, ImageRequest]:
    """Return a request of one step for each run."""
    requests = {}
    for run, entry in entries.items():
        sampling = entry.config.sampling
        requests[run] = ImageRequest("", 0, 1, sampling.guidance_scale, sampling.width_px, sampling.height_px, run=run)
    return requests
