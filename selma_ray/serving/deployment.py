"""The service on Ray Serve: API replicas before the generators' and the evaluator's."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.serving.catalogue import Entry
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.evaluator import Scorer
from selma_ray.serving.experts import OpenExperts
from selma_ray.serving.filters import check_safety_checker
from selma_ray.serving.keys import ApiKey, read_keys
from selma_ray.serving.replicas import API, ApiReplica, Common, EvaluatorReplica, GeneratorReplica
from selma_ray.serving.served import Hosted, ServedModels
from selma_ray.serving.shared import LocalState

__all__ = ["application"]

_ONGOING_API_REQUESTS = 1000
_ONGOING_STATE_REQUESTS = 10_000
_BURST = 8  # requests that may arrive at one moment, while a replica with room is looked up for each
_RETRY_AFTER_S = 2
_HEALTH_CHECK_PERIOD_S = 5.0


def application(
    models: ServedModels,
    config: ServingConfig,
    cluster: ClusterConfig,
    open_scorer: Callable[[], Scorer],
    open_experts: OpenExperts | None = None,
    own_keys: Sequence[ApiKey] = (),
    others: Mapping[str, Hosted] | None = None,
) -> serve.Application:
    """Return the Ray Serve application that serves `models`, and the models of `others` by the names of their runs.

    `open_scorer` opens the judge and models of other scores on the evaluator's replicas, `open_experts` reads the experts
    on the generators'. `own_keys` are accepted beside those of the keys' file, where there is one.
    Raises ConfigError where the keys' file is unusable, or a safety checker is asked of a model without one.
    """
    hosted = {"": Hosted(models, config), **(others or {})}
    for each in hosted.values():
        check_safety_checker(each.config, each.models.merged)
    keys = (*read_keys(config.api_keys_file, config.requests_per_minute), *own_keys) if config.api_keys_file else ()
    place = _Place(config, cluster)
    generators = {run: place.generator(run, each, open_experts) for run, each in hosted.items()}
    evaluator = place.evaluator(open_scorer) if config.evaluator_replicas else None
    state = place.state(keys) if config.api_replicas > 1 else None
    entries = {run: Entry(each.models.names, each.config, run) for run, each in hosted.items()}
    common = Common(config, entries, keys, secrets.token_bytes(32), int(time.time()))
    return place.api().bind(common, generators, evaluator, state)


class _Place:
    """The deployments of a service, with what is the same in all of them."""

    def __init__(self, config: ServingConfig, cluster: ClusterConfig) -> None:
        self._config = config
        self._actors = {"num_cpus": config.num_cpus, **role_options("serve", cluster)}
        self._common: dict[str, Any] = {
            "logging_config": {"log_level": cluster.log_level},
            # A replica that is replaced finishes what it has accepted.
            "graceful_shutdown_timeout_s": config.request_timeout_s,
        }

    def generator(self, run: str, hosted: Hosted, open_experts: OpenExperts | None) -> serve.Application:
        config = hosted.config
        return serve.deployment(
            GeneratorReplica,
            name=f"generator-{run}" if run else "generator",
            # What is beyond the engines' own queues is refused by the handle, at once: a replica that is full is asked no more.
            max_ongoing_requests=config.max_batch_size + config.max_queued_requests,
            max_queued_requests=max(config.max_queued_requests, _BURST),
            ray_actor_options={**self._actors, "num_gpus": config.num_gpus},
            health_check_period_s=_HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=30,
            **self._common,
            **_replicas(config.generator_replicas, config.max_generator_replicas, config.max_batch_size),
        ).bind(hosted.models, config, open_experts)

    def evaluator(self, open_scorer: Callable[[], Scorer]) -> serve.Application:
        config = self._config
        return serve.deployment(
            EvaluatorReplica,
            name="evaluator",
            max_ongoing_requests=2 * config.judge_batch_size,
            max_queued_requests=config.max_queued_requests,
            ray_actor_options={**self._actors, "num_gpus": config.evaluator_num_gpus},
            **self._common,
            **_replicas(config.evaluator_replicas, config.max_evaluator_replicas, config.judge_batch_size),
        ).bind(open_scorer, config)

    def state(self, keys: Sequence[ApiKey]) -> serve.Application:
        # Who has claimed an answer may die with it: nobody waits for it longer than an answer takes.
        return serve.deployment(
            LocalState,
            name="state",
            max_ongoing_requests=_ONGOING_STATE_REQUESTS,
            ray_actor_options={**self._actors, "num_cpus": 0},
            **self._common,
        ).bind(self._config, keys, self._config.request_timeout_s)

    def api(self) -> serve.Deployment:
        return serve.deployment(
            ApiReplica,
            name=API,
            num_replicas=self._config.api_replicas,
            max_ongoing_requests=_ONGOING_API_REQUESTS,
            max_queued_requests=_ONGOING_API_REQUESTS,
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_S),
            ray_actor_options={**self._actors, "num_cpus": 0},
            **self._common,
        )


def _replicas(fewest: int, most: int | None, full_batch: int) -> dict[str, Any]:
    """Return a fixed number of replicas, or bounds between which they follow the queue: each is to have a full batch."""
    if most is None or most == fewest:
        return {"num_replicas": fewest}
    scaling = AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=full_batch)
    return {"autoscaling_config": scaling}
