"""Base, experts and merged model, scored on the same prompts and seeds."""

from typing import Any

from selma_ray.errors import ConfigError
from selma_ray.progress import Report
from selma_ray.run.opening import Run

__all__ = ["evaluate", "models_under_test"]


def evaluate(run: Run, report: Report) -> dict[str, Any]:
    """Score base, experts and merged model on the same prompts and seeds, then write the report."""
    from selma_ray.evaluation.run import evaluate_models
    from selma_ray.judging.suites import open_suite

    recipe = run.recipe
    suite = open_suite(recipe.evaluation.suite, recipe.evaluation.max_prompts)
    summary = evaluate_models(
        run.folder, models_under_test(run), suite, recipe.evaluation, recipe.seed, recipe.cluster, report,
    )  # fmt: skip
    return summary.as_dict()


def models_under_test(run: Run) -> dict[str, Any]:
    """Return the models that are evaluated, by name: base, the experts, the merged one, those of other rounds and those the recipe adds."""
    from selma_ray.evaluation.run import ModelUnderTest
    from selma_ray.experts.plan import plan_experts

    recipe = run.recipe
    models = {"base": ModelUnderTest(recipe.model)}
    if recipe.evaluation.experts:
        for expert in plan_experts(run.skill_names, recipe.experts):
            models[expert.name] = ModelUnderTest(recipe.model, adapter_dir=run.folder.path("experts", expert.name))
    models["merged"] = ModelUnderTest(run.merged_model)
    if recipe.rounds > 1:
        from selma_ray.run.rounds import rounds_made

        kept = (run.folder.done("merge") or {}).get("kept_round")
        adapters = {
            number: made.folder.path("merged", recipe.merging.name, "adapter")
            for number, made in rounds_made(run).items()
            if number != kept
        }
        models |= {f"round-{number}": ModelUnderTest(recipe.model, place) for number, place in adapters.items()}
    for name, other in recipe.evaluation.models.items():
        if name in models:
            raise ConfigError(f"evaluation.models.{name} is the name of a model of this run; choose another")
        models[name] = ModelUnderTest(other.model, other.adapter_dir)
    return models
