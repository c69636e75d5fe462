"""The steps of a study: for each seed its experiments, then the scores of all their models at every guidance scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selma_ray.cluster.connection import connect
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.progress import Report
from selma_ray.run.evaluate import models_under_test
from selma_ray.run.opening import Run, open_run
from selma_ray.run.stages import run_stage
from selma_ray.study.arms import arm_recipe, check_study, reuse
from selma_ray.study.config import ArmConfig
from selma_ray.study.costs import timed
from selma_ray.study.pictures import write_pictures
from selma_ray.study.study import Study
from selma_ray.study.tables import StudyScores, model_kind, model_titles, write_tables

__all__ = ["StudyStep", "study_steps"]

BASE = "base"


@dataclass(frozen=True)
class StudyStep:
    """A part of a study that is shown on its own; done again, it goes on where it stopped."""

    title: str
    do: Callable[[Report], None]


def study_steps(study: Study) -> list[StudyStep]:
    """Return the steps of a study; raises ConfigError for an experiment that cannot be made, JudgeError for a suite that cannot be read."""
    check_study(study)
    _suite(study)
    config, run = study.config, open_run(study.recipe)
    arms = {(seed, name): open_run(arm_recipe(study, name, seed)) for seed in config.seeds for name in config.arms}
    steps = []
    for seed in config.seeds:
        of_seed = {name: arms[seed, name] for name in config.arms}
        earlier = [run]
        for name, arm in of_seed.items():
            title = f"Seed {seed}, {config.arms[name].title}"
            steps.append(StudyStep(title, partial(_make, arm, tuple(earlier), config.arms[name])))
            earlier.append(arm)
        for guidance_scale in config.guidance_scales:
            title = f"Seed {seed}, scores at guidance {guidance_scale:g}"
            steps.append(StudyStep(title, partial(_score, study, of_seed, seed, guidance_scale)))
    return steps


def _make(arm: Run, earlier: tuple[Run, ...], config: ArmConfig, report: Report) -> None:
    """Make an experiment's models, from what earlier experiments of the seed have made where that is the same."""
    reuse(arm, earlier)
    with timed(arm):
        for stage in ("generate", "train", *(["merge"] if "merged" in config.models else [])):
            run_stage(arm, stage, report)


def _score(study: Study, arms: dict[str, Run], seed: int, guidance_scale: float, report: Report) -> None:
    """Score base and all models of a seed at one guidance scale, then write the tables so far, and the first seed's pictures."""
    from selma_ray.evaluation.config import SECOND_ANSWERS
    from selma_ray.evaluation.run import ModelUnderTest, evaluate_models

    evaluation = study.recipe.evaluation
    config = evaluation.model_copy(
        update={
            "sampling": evaluation.sampling.model_copy(update={"guidance_scale": guidance_scale}),
            "suite": study.suite,
            "max_prompts": study.config.max_prompts or evaluation.max_prompts,
            "calibration_scenes": 0,
            "compare_with": {},
        }
    )
    suite = _suite(study)
    models = {BASE: ModelUnderTest(study.recipe.model)}
    for name, arm in arms.items():
        models |= {f"{name}.{model}": tested for model, tested in _models(arm, study.config.arms[name]).items()}
    folder = study.scores(seed, guidance_scale)
    folder.wait_out_outages()
    connect(study.recipe.cluster)
    evaluate_models(folder, models, suite, config, seed, study.recipe.cluster, report)
    folder.mark_done("scores", {"models": list(models)})
    second = StudyScores.read(study, suite, config, SECOND_ANSWERS) if config.second_judge else None
    write_tables(study, StudyScores.read(study, suite, config), second)
    if seed == study.config.seeds[0]:
        shown = [name for name in models if name == BASE or model_kind(name.partition(".")[2]) != "experts"]
        write_pictures(study, suite, seed, guidance_scale, model_titles(study.config, shown))


def _suite(study: Study) -> Sequence[PromptWithQuestions]:
    from selma_ray.judging.suites import open_suite

    return open_suite(study.suite, study.config.max_prompts or study.recipe.evaluation.max_prompts)


def _models(arm: Run, config: ArmConfig) -> dict[str, Any]:
    """Return an experiment's models that are to be scored."""
    return {
        name: tested
        for name, tested in models_under_test(arm).items()
        if name != BASE and model_kind(name) in config.models
    }
