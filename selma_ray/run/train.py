"""The skill experts and the baselines that the recipe asks for."""

from functools import partial
from typing import Any

from selma_ray.config import identity
from selma_ray.progress import Report
from selma_ray.records import content_id
from selma_ray.run.generate import open_scorer
from selma_ray.run.opening import Run
from selma_ray.run.questions import open_source, write_questions

__all__ = ["train"]


def train(run: Run, report: Report) -> dict[str, Any]:
    """Fit one expert per skill and the baselines, all at once within the cluster's means; returns their final losses."""
    from selma_ray.experts.launch import plan_experts, train_experts

    recipe = run.recipe
    results = train_experts(
        run.folder, plan_experts(run.skill_names, recipe.experts), recipe.model, recipe.seed, recipe.cluster,
        report, _dev_scorer(run), _rounds(run, report),
    )  # fmt: skip
    return {name: result.as_dict() for name, result in results.items()}


def _dev_scorer(run: Run) -> Any:
    """Return what scores adapters for the choice of checkpoints, or None where the recipe chooses none."""
    selection = run.recipe.experts.selection
    if selection is None:
        return None
    from selma_ray.run.dev_scorer import dev_scorer

    return dev_scorer(run, selection.suite, selection.max_prompts, "experts.selection", selection.num_gpus)


def _rounds(run: Run, report: Report) -> Any:
    """Return what the rounds of experts.nft draw and how it is scored, or None where the recipe asks for none."""
    recipe, nft = run.recipe, run.recipe.experts.nft
    if nft is None:
        return None
    from selma_ray.experts.rounds import RoundsSource
    from selma_ray.judging.judges.opening import judge_identity
    from selma_ray.models.identity import model_identity
    from selma_ray.prompts.store import read_prompts

    write_questions(run, ["train"], report)
    changes: dict[str, Any] = {"guidance_scale": nft.guidance_scale}
    if nft.sampling_steps:
        changes["steps"] = nft.sampling_steps
    prompts = {skill: read_prompts(run.folder, skill, "train")["prompt"].to_pylist() for skill in run.skill_names}
    judge = content_id(judge=judge_identity(nft.judge), questions=identity(recipe.questions))
    return RoundsSource(
        prompts, recipe.images.sampling.model_copy(update=changes), content_id(model=model_identity(recipe.model)), judge,
        partial(open_scorer, nft.judge, open_source(run)),
    )  # fmt: skip
