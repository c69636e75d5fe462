"""The service for Ray Serve: `serve deploy serve/config.yaml`, or `serve run serve.app:build run_dir=runs/demo`."""

# Ray Serve reads the type of `build`'s argument from its annotation: annotations must not be postponed here.
from dataclasses import replace
from pathlib import Path

from ray import serve

from selma_ray.cluster.config import ClusterConfig
from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.judging.sources import GrammarQuestions, QuestionSource, WholeQuestion
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import MINIATURE, locate_text_to_image
from selma_ray.run.opening import Run, open_run
from selma_ray.run.serve import hosted_runs, served_models, service_source
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.credentials import open_signer
from selma_ray.serving.deployment import application
from selma_ray.serving.experts import check_adapters, open_experts
from selma_ray.serving.scorer import scorer_of
from selma_ray.serving.served import ServedModels

__all__ = ["ServeArgs", "build"]


class ServeArgs(ServingConfig):
    """What `build` takes: a model or a run, and any of ServingConfig's fields, which go before the run's own."""

    model: ModelConfig = ModelConfig()
    """The model to serve where no run is named."""
    model_name: str | None = None
    """The name that clients ask for; default: the merged model's name, or the last part of the model's."""
    run_dir: str | None = None
    """A run whose merged model is served, sampled as its recipe says."""
    cluster: ClusterConfig = ClusterConfig()
    """Where replicas are placed."""


def build(args: ServeArgs) -> serve.Application:
    """Return the Ray Serve application; raises ConfigError where the model, the judge or the keys cannot be used."""
    given = args.model_dump(include=args.model_fields_set & ServingConfig.model_fields.keys())
    source: QuestionSource = GrammarQuestions() if args.model.name == MINIATURE else WholeQuestion()
    if args.run_dir is None:
        config = validate(ServingConfig, given, source="serve arguments")
        check_adapters(config.adapters, args.model)
        base = args.model if config.adapters else None
        models = ServedModels(args.model_name or Path(args.model.name).name, args.model, base, config.adapters)
    else:
        run = _finished_run(args.run_dir)
        config = validate(ServingConfig, run.recipe.serving.model_dump() | given, source="serve arguments")
        models = served_models(run, config)
        models = replace(models, name=args.model_name or models.name)
        source = service_source(run)
    others = hosted_runs(config, models)
    # Checked here, before replicas are started that would fail one after the other.
    open_signer(config)
    for each in (models, *(hosted.models for hosted in others.values())):
        locate_text_to_image(each.merged.name, each.merged.revision)
    return application(models, config, args.cluster, scorer_of(config, source), open_experts, (), others)


def _finished_run(run_dir: str) -> Run:
    run = open_run(run_dir)
    if run.folder.done("merge") is None:
        raise ConfigError(f"run_dir {run_dir} holds no merged model; run `selma merge` first")
    return run
