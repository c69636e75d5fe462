"""The merged model of a run as an HTTP service."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from selma_ray.adapters.files import CONFIG_FILE
from selma_ray.cluster.connection import cluster_memory_bytes, connect
from selma_ray.cluster.placement import is_local
from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.judging.sources import GrammarQuestions, QuestionSource
from selma_ray.run.demands import SERVE, check_stages_fit
from selma_ray.run.host_memory import check_host
from selma_ray.run.memory import check_cards
from selma_ray.run.opening import Run, open_run
from selma_ray.run.question_source import source_name
from selma_ray.run.questions import open_source
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.experts import check_adapters, open_experts
from selma_ray.serving.run import Service, check_start, start_service
from selma_ray.serving.scorer import scorer_of
from selma_ray.serving.served import Hosted, ServedModels

__all__ = ["hosted_runs", "served_models", "service_source", "start_merged"]

_DEPTH_OF_EXPERTS = 3  # experts/NAME/adapter_config.json; checkpoints lie deeper


def served_models(run: Run, config: ServingConfig) -> ServedModels:
    """Return the merged model of a run and, where they are wanted, its base model, every expert that is there, and LoRAs of others.

    Raises AdapterError for one of these that does not fit, ConfigError where its name is taken.
    """
    check_adapters(config.adapters, run.recipe.model)
    return _served(run, run.recipe.merging.name, config.adapters, experts=config.experts)


def hosted_runs(config: ServingConfig, own: ServedModels) -> dict[str, Hosted]:
    """Return the runs that serving.models names, each sampled as its own recipe says.

    Raises ConfigError, naming the key, for a folder without a finished merge, a name that is taken, and sampling beyond the bounds.
    """
    hosted = {}
    for name, folder in config.models.items():
        key = f"serving.models.{name}"
        if name in own.names.all():
            raise ConfigError(f"{key} must have another name: {name} is a model of the service's own run")
        run = open_run(folder)
        if run.folder.done("merge") is None:
            raise ConfigError(f"{key} {folder} holds no merged model; run `selma merge` there first, or leave it out")
        models = _served(run, name, {}, experts=config.experts, prefix=f"{name}/")
        hosted[name] = Hosted(models, _config_of(run, config, key))
    return hosted


def _served(run: Run, name: str, adapters: Mapping[str, str], *, experts: bool, prefix: str = "") -> ServedModels:
    if not (experts or adapters):
        return ServedModels(name, run.merged_model, prefix=prefix)
    fitted = _experts(run) if experts else {}
    if taken := sorted(fitted.keys() & adapters.keys()):
        raise ConfigError(
            f"serving.adapters.{taken[0]} must not have the name of an expert of the run; choose another one"
        )
    return ServedModels(name, run.merged_model, run.recipe.model, {**fitted, **adapters}, prefix)


def _config_of(run: Run, config: ServingConfig, key: str) -> ServingConfig:
    """Return how a run of serving.models is served: as the service is, but for what its recipe says of sampling and sizes."""
    own = run.recipe.serving
    sampled = {"sampling": own.sampling.model_dump(), "max_size_px": own.max_size_px}
    return validate(ServingConfig, {**config.model_dump(), **sampled, "models": {}, "adapters": {}}, source=key)


def _experts(run: Run) -> dict[str, str]:
    paths = map(PurePosixPath, run.folder.files("experts", suffix=CONFIG_FILE))
    names = sorted(path.parts[-2] for path in paths if len(path.parts) == _DEPTH_OF_EXPERTS)
    return {name: run.folder.path("experts", name) for name in names}


def service_source(run: Run) -> QuestionSource:
    """Return the source of questions of a run's service.

    For the miniature it is the grammar alone: its judge was never taught the question about the whole prompt.
    """
    return GrammarQuestions() if source_name(run.recipe) == "grammar" else open_source(run)


def start_merged(run: Run) -> Service:
    """Serve the merged model of a run and return once it answers; the caller stops it."""
    recipe = run.recipe
    check_start(recipe.serving, recipe.cluster)
    models = served_models(run, recipe.serving)
    others = hosted_runs(recipe.serving, models)
    connect(recipe.cluster)
    check_stages_fit(recipe, [SERVE])
    check_cards(recipe, [SERVE])
    if others and is_local(recipe.cluster):  # an autoscaling cluster has nodes that are not there yet
        check_host(recipe, cluster_memory_bytes())
    return start_service(
        models,
        recipe.serving,
        recipe.cluster,
        scorer_of(recipe.serving, service_source(run)),
        open_experts,
        name=re.sub(r"[^\w.-]", "-", run.folder.name),
        others=others,
    )
