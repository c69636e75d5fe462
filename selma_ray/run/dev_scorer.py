"""What scores adapters on the dev prompts of a run, for the choice of checkpoints and the search of merge weights."""

from selma_ray.errors import ConfigError
from selma_ray.judging.dev_scores import DevScorer
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.prompts.store import read_prompts
from selma_ray.run.opening import Run
from selma_ray.run.questions import open_source, write_questions

__all__ = ["dev_prompts", "dev_scorer"]


def dev_scorer(
    run: Run, suite: str | None, max_prompts: int | None, section: str, num_gpus: float | None = None
) -> DevScorer:
    """Return what scores adapters as the evaluation of a run does: same sampling, same judge, dev prompts in place of the suite's.

    `section` is the part of the recipe that asks for it; where it has `num_gpus` of its own, rendering and judging both take those.
    Raises ConfigError where a skill has no dev prompts.
    """
    recipe, evaluation = run.recipe, run.recipe.evaluation
    judge = evaluation.judge if num_gpus is None else evaluation.judge.model_copy(update={"num_gpus": num_gpus})
    return DevScorer(
        recipe.model,
        evaluation.sampling,
        judge,
        evaluation.dsg_scorer,
        dev_prompts(run, suite, section),
        max_prompts,
        recipe.seed,
        evaluation.batch_size,
        evaluation.num_cpus,
        evaluation.num_gpus if num_gpus is None else num_gpus,
        "evaluation.num_gpus" if num_gpus is None else f"{section}.num_gpus",
    )


def dev_prompts(run: Run, suite_name: str | None, section: str) -> dict[str, list[PromptWithQuestions]]:
    """Return each skill's dev prompts with their questions: those of a suite, or those the run kept, asked by its own source.

    Questions that are yet to be written are written first. Raises ConfigError for a skill that has no dev prompts.
    """
    if suite_name:
        from selma_ray.judging.suites import open_suite

        suite = open_suite(suite_name)
        prompts = {skill: [prompt for prompt in suite if prompt.skill == skill] for skill in run.skill_names}
        remedy = f"add some to {section}.suite {suite_name}"
    else:
        prompts = _kept_prompts(run)
        remedy = f"raise prompts.dev_fraction, or leave {section} out"
    for skill, of_skill in prompts.items():
        if not of_skill:
            raise ConfigError(f"{section} needs dev prompts of every skill, {skill} has none; {remedy}")
    return prompts


def _kept_prompts(run: Run) -> dict[str, list[PromptWithQuestions]]:
    rows = {skill: read_prompts(run.folder, skill, "dev").to_pylist() for skill in run.skill_names}
    if any(rows.values()):
        write_questions(run, ["dev"])
    source = open_source(run)
    return {
        skill: [
            PromptWithQuestions(row["id"], skill, row["prompt"], source.questions(row["prompt"])) for row in of_skill
        ]
        for skill, of_skill in rows.items()
    }
