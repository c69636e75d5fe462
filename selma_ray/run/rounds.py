"""Rounds of a whole run: the merge of one round draws the next one's images, until the dev split no longer gains.

rounds/<n>/               a run of its own, from the second round on: its recipe, images, experts and merge; the first is the run itself
rounds/dev-scores.json    the score of each round's merge on the first round's dev prompts
"""

from pathlib import PurePosixPath
from typing import Any

from selma_ray.errors import ConfigError
from selma_ray.progress import Report
from selma_ray.records import seed_of
from selma_ray.run.opening import Run, open_run
from selma_ray.run.recipe import Recipe

__all__ = ["go_rounds", "round_recipe", "rounds_made"]

_SCORES = ("rounds", "dev-scores.json")


def go_rounds(run: Run, report: Report) -> dict[str, Any]:
    """Make the rounds after the first, each from the merge before it; returns every round's dev score and which round is kept.

    Stops after a round that does not score above the one before. Raises ConfigError where the merge that is to draw was deleted.
    """
    scores = [_dev_score(run, run, 1)]
    last = run
    for number in range(2, run.recipe.rounds + 1):
        last = _make(run, last, number, report)
        scores.append(_dev_score(run, last, number))
        if scores[-1] <= scores[-2]:
            break
    kept = max(range(len(scores)), key=lambda place: (scores[place], -place)) + 1
    return {
        "rounds": [{"round": place, "dev_dsg": score} for place, score in enumerate(scores, start=1)],
        "kept_round": kept,
    }


def round_recipe(run: Run, before: Run, number: int) -> Recipe:
    """Return the recipe of a round: the run's, whose images are drawn by the merge of the round `before`."""
    recipe = run.recipe
    changes: dict[str, Any] = {
        "run_dir": run.folder.path("rounds", str(number)),
        "rounds": 1,
        "data": recipe.data.model_copy(update={"model": before.merged_model}),
    }
    if recipe.data.prompts_each_round == "new":
        changes["seed"] = seed_of(recipe.seed, round=number)
    return recipe.model_copy(update=changes)


def rounds_made(run: Run) -> dict[int, Run]:
    """Return the finished rounds of a run by number, the first of which is the run itself."""
    made = (run.folder.done("merge") or {}).get("rounds", [])
    later = {each["round"] for each in made} - {1}
    return {1: run} | {number: open_run(run.folder.path("rounds", str(number))) for number in sorted(later)}


def _make(run: Run, before: Run, number: int, report: Report) -> Run:
    from selma_ray.run.stages import run_stage

    pipeline = PurePosixPath(*before.merged_parts, "pipeline", "model_index.json")
    if not before.folder.exists(str(pipeline)):
        raise ConfigError(
            f"rounds: round {number} is drawn by the merge of round {number - 1}, and {before.folder.path(str(pipeline.parent))} is gone; "
            f"delete {before.folder.path('done', 'merge.json')} and run the same command again"
        )
    made = open_run(round_recipe(run, before, number))
    if run.recipe.data.prompts_each_round == "kept" and made.folder.done("generate") is None:
        run.folder.copy_files(made.folder, run.folder.files("prompts"))
    for stage in ("generate", "train", "merge"):
        run_stage(made, stage, report)
    return made


def _dev_score(run: Run, of_round: Run, number: int) -> float:
    """Return the DSG of a round's merged adapter on the dev prompts of the run, scored once."""
    import ray

    from selma_ray.cluster.placement import role_options, shared_resources
    from selma_ray.models.device import task_options
    from selma_ray.run.dev_scorer import dev_scorer

    scores: dict[str, float] = run.folder.read_json(*_SCORES) if run.folder.exists(*_SCORES) else {}
    if str(number) not in scores:
        evaluation = run.recipe.evaluation
        resources = shared_resources(
            {"num_cpus": evaluation.num_cpus, "num_gpus": evaluation.num_gpus},
            {"num_cpus": evaluation.judge.num_cpus, "num_gpus": evaluation.judge.num_gpus},
        )
        task = ray.remote(_score).options(
            num_cpus=resources["num_cpus"],
            **task_options(resources["num_gpus"]),
            **role_options("render", run.recipe.cluster),
        )
        adapter = of_round.folder.path(*of_round.merged_parts, "adapter")
        scores[str(number)] = ray.get(
            task.remote(dev_scorer(run, None, None, "rounds"), adapter, run.skill_names, resources["num_gpus"])
        )
        run.folder.write_json(scores, *_SCORES)
    return scores[str(number)]


def _score(scorer: Any, adapter_dir: str, skills: list[str], num_gpus: float) -> float:
    from selma_ray.models.device import see_own_gpus

    see_own_gpus(num_gpus)
    return float(scorer(adapter_dir, skills)["dsg"])
