"""What scores adapters on the dev prompts of a run, for the choice of checkpoints and the search of merge weights."""

from collections.abc import Sequence

from selma_ray.errors import CaptionError, ConfigError
from selma_ray.judging.dev_scores import DevScorer
from selma_ray.judging.questions import PromptWithQuestions, questions_for_prompt
from selma_ray.judging.suites import open_suite
from selma_ray.prompts.store import read_prompts
from selma_ray.run.opening import Run
from selma_ray.storage import RunFolder

__all__ = ["dev_prompts", "dev_scorer"]


def dev_scorer(run: Run, suite: str | None, max_prompts: int | None, section: str) -> DevScorer:
    """Return what scores adapters as the evaluation of a run does: same sampling, same judge, dev prompts in place of the suite's.

    `section` is the part of the recipe that asks for it. Raises ConfigError where a skill has no dev prompts.
    """
    recipe, evaluation = run.recipe, run.recipe.evaluation
    return DevScorer(
        recipe.model,
        evaluation.sampling,
        evaluation.judge,
        evaluation.dsg_scorer,
        dev_prompts(run.folder, run.skill_names, suite, section),
        max_prompts,
        recipe.seed,
        evaluation.batch_size,
        evaluation.num_cpus,
    )


def dev_prompts(
    folder: RunFolder, skills: Sequence[str], suite_name: str | None, section: str
) -> dict[str, list[PromptWithQuestions]]:
    """Return each skill's dev prompts with their questions: those of a suite, or those the run kept.

    Raises ConfigError for a skill that has none; `section` is the part of the recipe that asks for them.
    """
    if suite_name:
        suite = open_suite(suite_name)
        prompts = {skill: [prompt for prompt in suite if prompt.skill == skill] for skill in skills}
        remedy = f"add some to {section}.suite {suite_name}"
    else:
        prompts = {skill: _kept_prompts(folder, skill, section) for skill in skills}
        remedy = f"raise prompts.dev_fraction, or leave {section} out"
    for skill, of_skill in prompts.items():
        if not of_skill:
            raise ConfigError(f"{section} needs dev prompts of every skill, {skill} has none; {remedy}")
    return prompts


def _kept_prompts(folder: RunFolder, skill: str, section: str) -> list[PromptWithQuestions]:
    rows = read_prompts(folder, skill, "dev").to_pylist()
    try:
        return [
            PromptWithQuestions(row["id"], skill, row["prompt"], questions_for_prompt(row["prompt"])) for row in rows
        ]
    except CaptionError as error:
        raise ConfigError(
            f"{section}: a dev prompt of {skill} has no questions ({error}); name {section}.suite"
        ) from None
