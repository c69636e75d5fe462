"""The merged model of a run as an HTTP service."""

import re
from pathlib import PurePosixPath

from selma_ray.adapters.files import CONFIG_FILE
from selma_ray.cluster.connection import connect
from selma_ray.errors import ConfigError
from selma_ray.judging.sources import GrammarQuestions, QuestionSource
from selma_ray.run.demands import SERVE, check_stages_fit
from selma_ray.run.memory import check_cards
from selma_ray.run.opening import Run
from selma_ray.run.question_source import source_name
from selma_ray.run.questions import open_source
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.experts import check_adapters, open_experts
from selma_ray.serving.run import Service, check_start, start_service
from selma_ray.serving.scorer import scorer_of
from selma_ray.serving.served import ServedModels

__all__ = ["served_models", "service_source", "start_merged"]

_DEPTH_OF_EXPERTS = 3  # experts/NAME/adapter_config.json; checkpoints lie deeper


def served_models(run: Run, config: ServingConfig) -> ServedModels:
    """Return the merged model of a run and, where they are wanted, its base model, every expert that is there, and LoRAs of others.

    Raises AdapterError for one of these that does not fit, ConfigError where its name is taken.
    """
    name, model = run.recipe.merging.name, run.recipe.model
    if not (config.experts or config.adapters):
        return ServedModels(name, run.merged_model)
    check_adapters(config.adapters, model)
    experts = _experts(run) if config.experts else {}
    if taken := sorted(experts.keys() & config.adapters.keys()):
        raise ConfigError(
            f"serving.adapters.{taken[0]} must not have the name of an expert of the run; choose another one"
        )
    return ServedModels(name, run.merged_model, model, {**experts, **config.adapters})


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
    connect(recipe.cluster)
    check_stages_fit(recipe, [SERVE])
    check_cards(recipe, [SERVE])
    return start_service(
        served_models(run, recipe.serving),
        recipe.serving,
        recipe.cluster,
        scorer_of(recipe.serving, service_source(run)),
        open_experts,
        name=re.sub(r"[^\w.-]", "-", run.folder.name),
    )
