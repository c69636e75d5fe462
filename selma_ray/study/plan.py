"""What a study will make, counted before anything runs; what its experiments share is counted once."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from selma_ray.config import identity
from selma_ray.errors import SelmaError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.plan import PlannedExpert, plan_experts
from selma_ray.merging.config import DistilConfig
from selma_ray.models.config import SamplingConfig
from selma_ray.prompts.splits import train_count
from selma_ray.run.recipe import Recipe
from selma_ray.study.arms import arm_recipe, check_study, shared_values
from selma_ray.study.config import ArmConfig
from selma_ray.study.study import Study

__all__ = ["StudyPlan", "plan_study"]


@dataclass(frozen=True)
class StudyPlan:
    """Counts over all seeds; of experiments of several rounds, as if none ended early."""

    runs: int
    prompts: int
    """Prompts that the language model writes and the filter keeps."""
    images: tuple[tuple[int, SamplingConfig], ...]
    """Training images that a model renders, and how."""
    experts: tuple[ExpertsConfig, ...]
    """Settings of each LoRA and mixture that is fitted."""
    skills: int
    distilled: tuple[DistilConfig, ...]
    """Settings of each student."""
    scored: tuple[tuple[int, SamplingConfig], ...] | None
    """Images that are scored, and how; None where the suite cannot be read."""


def plan_study(study: Study) -> StudyPlan:
    """Count what a study makes; raises ConfigError for an experiment that cannot be made."""
    check_study(study)
    config = study.config
    arms = [(arm_recipe(study, name, config.seeds[0]), arm) for name, arm in config.arms.items()]
    made = [arm for arm, _ in arms]
    seeds, skills = len(config.seeds), len(study.recipe.skills)
    written = [each for each in _different(made, "prompts") if each.data.prompts == "llm"]
    rendered = [each for each in _different(made, "images") if each.data.images == "model"]
    fitted = {
        json.dumps([shared_values(each, "experts"), planned.name, _settings(planned.config)]): planned.config
        for each in made
        for planned in _planned(each, skills)
    }
    again = [each for each in made for _ in range(each.rounds - 1)]
    students = tuple(
        each.merging.distil for each, arm in arms if each.merging.method == "distil" and "merged" in arm.models
    )
    return StudyPlan(
        runs=seeds * len(arms),
        prompts=seeds * skills * sum(each.prompts.per_skill for each in written),
        images=tuple(
            (seeds * skills * _images_per_skill(each), each.images.largest_sampling) for each in (*rendered, *again)
        ),
        experts=(*fitted.values(), *(planned.config for each in again for planned in _planned(each, skills))) * seeds,
        skills=skills,
        distilled=students * seeds,
        scored=_scored(study, seeds, 1 + sum(_models(each, arm) for each, arm in arms)),
    )


def _planned(recipe: Recipe, skills: int) -> list[PlannedExpert]:
    return plan_experts([str(number) for number in range(skills)], recipe.experts)


def _different(recipes: Iterable[Recipe], part: str) -> list[Recipe]:
    """Return one of those recipes each that make the same of a run's folder."""
    return list({json.dumps(shared_values(recipe, part)): recipe for recipe in recipes}.values())


def _settings(config: ExpertsConfig) -> dict[str, Any]:
    """Return what decides an expert, without what is fitted beside it."""
    return {key: value for key, value in identity(config).items() if key not in ("mixed", "moe")}


def _images_per_skill(recipe: Recipe) -> int:
    return train_count(recipe.prompts) * recipe.images.per_prompt


def _models(recipe: Recipe, arm: ArmConfig) -> int:
    mixed = recipe.experts.mixed
    counts = {"experts": len(recipe.skills), "mixed": len(mixed.ranks) if mixed else 0, "moe": 1, "merged": 1}
    return sum(counts[kind] for kind in set(arm.models))


def _scored(study: Study, seeds: int, models: int) -> tuple[tuple[int, SamplingConfig], ...] | None:
    from selma_ray.judging.suites import open_suite

    config, evaluation = study.config, study.recipe.evaluation
    try:
        prompts = len(open_suite(study.suite, config.max_prompts or evaluation.max_prompts))
    except SelmaError:
        return None
    count = seeds * models * prompts * len(evaluation.seeds)
    changes: list[dict[str, Any]] = [{"guidance_scale": scale} for scale in config.guidance_scales]
    return tuple((count, evaluation.sampling.model_copy(update=change)) for change in changes)
