"""What a study will make, counted before anything runs; what its experiments share is counted once."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from selma_ray.errors import SelmaError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.plan import plan_experts
from selma_ray.models.config import SamplingConfig
from selma_ray.run.recipe import Recipe
from selma_ray.study.arms import arm_recipe, check_study, shared_values
from selma_ray.study.config import ArmConfig

__all__ = ["StudyPlan", "plan_study"]


@dataclass(frozen=True)
class StudyPlan:
    """Counts over all seeds."""

    runs: int
    prompts: int
    """Prompts that the language model writes and the filter keeps."""
    images: tuple[tuple[int, SamplingConfig], ...]
    """Training images that a model renders, and how."""
    experts: tuple[ExpertsConfig, ...]
    """Settings of each LoRA and mixture that is fitted."""
    scored: tuple[tuple[int, SamplingConfig], ...] | None
    """Images that are scored, and how; None where the suite cannot be read."""


def plan_study(recipe: Recipe) -> StudyPlan:
    """Count what the study of a recipe makes; raises ConfigError for an experiment that cannot be made."""
    study = check_study(recipe)
    arms = [(arm_recipe(recipe, name, study.seeds[0]), arm) for name, arm in study.arms.items()]
    made = [arm for arm, _ in arms]
    seeds, skills = len(study.seeds), len(recipe.skills)
    written = [each for each in _different(made, "prompts") if each.data.prompts == "llm"]
    rendered = [each for each in _different(made, "images") if each.data.images == "model"]
    fitted = {
        json.dumps([shared_values(each, "experts"), planned.name, _settings(planned.config)]): planned.config
        for each in made
        for planned in plan_experts([str(number) for number in range(skills)], each.experts)
    }
    return StudyPlan(
        runs=seeds * len(arms),
        prompts=seeds * skills * sum(each.prompts.per_skill for each in written),
        images=tuple((seeds * skills * _images_per_skill(each), each.images.sampling) for each in rendered),
        experts=tuple(fitted.values()) * seeds,
        scored=_scored(recipe, seeds, 1 + sum(_models(each, arm) for each, arm in arms)),
    )


def _different(recipes: Iterable[Recipe], part: str) -> list[Recipe]:
    """Return one of those recipes each that make the same of a run's folder."""
    return list({json.dumps(shared_values(recipe, part)): recipe for recipe in recipes}.values())


def _settings(config: ExpertsConfig) -> dict[str, Any]:
    """Return an expert's settings without what is fitted beside it."""
    return config.model_dump(mode="json", exclude={"mixed", "moe"})


def _images_per_skill(recipe: Recipe) -> int:
    return round(recipe.prompts.per_skill * (1 - recipe.prompts.dev_fraction)) * recipe.images.per_prompt


def _models(recipe: Recipe, arm: ArmConfig) -> int:
    mixed = recipe.experts.mixed
    counts = {"experts": len(recipe.skills), "mixed": len(mixed.ranks) if mixed else 0, "moe": 1, "merged": 1}
    return sum(counts[kind] for kind in set(arm.models))


def _scored(recipe: Recipe, seeds: int, models: int) -> tuple[tuple[int, SamplingConfig], ...] | None:
    from selma_ray.judging.suites import open_suite

    study, evaluation = recipe.study, recipe.evaluation
    assert study is not None
    try:
        prompts = len(open_suite(evaluation.suite, study.max_prompts or evaluation.max_prompts))
    except SelmaError:
        return None
    count = seeds * models * prompts * len(evaluation.seeds)
    changes: list[dict[str, Any]] = [{"guidance_scale": scale} for scale in study.guidance_scales]
    return tuple((count, evaluation.sampling.model_copy(update=change)) for change in changes)
