"""The experts become one model, by weights of the recipe or by weights that a search finds."""

from typing import Any

from selma_ray.progress import Progress, Report
from selma_ray.run.opening import Run

__all__ = ["merge"]


def merge(run: Run, report: Report) -> dict[str, Any]:
    """Merge the experts into one pipeline; returns what merging lost."""
    from selma_ray.merging.run import merge_experts

    recipe = run.recipe
    found = _searched(run, report) if recipe.merging.method == "search" else None
    inputs = _inputs(run, report) if recipe.merging.method == "regmean" else None
    report(Progress("merge", 0, 1))
    summary = merge_experts(run.folder, run.skill_names, recipe.model, recipe.merging, recipe.seed, found, inputs)
    report(Progress("merge", 1, 1))
    return summary.as_dict()


def _inputs(run: Run, report: Report) -> Any:
    from selma_ray.run.input_statistics import input_statistics

    return input_statistics(run, report)


def _searched(run: Run, report: Report) -> Any:
    from selma_ray.cluster.placement import shared_resources
    from selma_ray.merging.candidates import search_merge
    from selma_ray.run.dev_scorer import dev_scorer

    recipe, evaluation = run.recipe, run.recipe.evaluation
    search = recipe.merging.search
    resources = shared_resources(
        {"num_cpus": evaluation.num_cpus, "num_gpus": evaluation.num_gpus},
        {"num_cpus": evaluation.judge.num_cpus, "num_gpus": evaluation.judge.num_gpus},
    )
    return search_merge(
        run.folder, recipe.merging, dev_scorer(run, search.suite, search.max_prompts, "merging.search"), resources, recipe.seed,
        recipe.cluster, report,
    )  # fmt: skip
