"""The skill experts and the baselines that the recipe asks for."""

from typing import Any

from selma_ray.progress import Report
from selma_ray.run.opening import Run

__all__ = ["train"]


def train(run: Run, report: Report) -> dict[str, Any]:
    """Fit one expert per skill and the baselines, all at once within the cluster's means; returns their final losses."""
    from selma_ray.experts.launch import plan_experts, train_experts

    recipe = run.recipe
    results = train_experts(
        run.folder, plan_experts(run.skill_names, recipe.experts), recipe.model, recipe.seed, recipe.cluster,
        report, _dev_scorer(run),
    )  # fmt: skip
    return {name: result.as_dict() for name, result in results.items()}


def _dev_scorer(run: Run) -> Any:
    """Return what scores adapters for the choice of checkpoints, or None where the recipe chooses none."""
    selection = run.recipe.experts.selection
    if selection is None:
        return None
    from selma_ray.run.dev_scorer import dev_scorer

    return dev_scorer(run, selection.suite, selection.max_prompts, "experts.selection", selection.num_gpus)
