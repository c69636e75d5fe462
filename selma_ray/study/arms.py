"""The runs of a study: one for each experiment and seed, each in a folder of its own, sharing what earlier ones have made."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selma_ray.config import apply_overrides, validate
from selma_ray.errors import ConfigError
from selma_ray.loop import Run
from selma_ray.recipe import Recipe
from selma_ray.study.config import StudyConfig

__all__ = ["arm_recipe", "check_study", "reuse", "study_folder"]

STUDY = "study"

# What a run's folder holds of each stage, and the parts of a recipe that decide it, beyond those of the stage before.
_STAGES: tuple[tuple[str | None, tuple[str, ...], tuple[str, ...]], ...] = (
    (None, ("prompts",), ("skills", "seed", "prompts", "data.prompts", "evaluation.suite")),
    ("generate", ("images",), ("model", "data", "images")),
    ("train", ("cache", "experts"), ("experts", "evaluation")),
)


def study_folder(run: Run, *parts: str) -> str:
    """Return a place within a study, in the folder of its run."""
    return run.folder.path(STUDY, *parts)


def check_study(recipe: Recipe) -> StudyConfig:
    """Return the study of a recipe; raises ConfigError where there is none or an experiment cannot be made."""
    study = recipe.study
    if study is None:
        raise ConfigError(
            "study names no experiments; take a recipe with a study section, such as jobs/recipes/miniature.yaml"
        )
    if study.reference not in study.arms or "merged" not in study.arms[study.reference].models:
        raise ConfigError(
            f"study.reference must name one of study.arms whose merged model is scored, got {study.reference!r}"
        )
    for name in study.arms:
        arm_recipe(recipe, name, study.seeds[0])
    return study


def arm_recipe(recipe: Recipe, name: str, seed: int) -> Recipe:
    """Return the recipe of an experiment; raises ConfigError where its changes do not fit."""
    assert recipe.study is not None
    run_dir = f"{recipe.run_dir}/{STUDY}/{name}/seed={seed}"
    whole = recipe.model_dump(mode="json") | {"study": None, "run_dir": run_dir}
    changes = [f"{key}={json.dumps(value)}" for key, value in recipe.study.arms[name].changes.items()]
    fixed = {change.partition("=")[0].partition(".")[0] for change in changes} & {"seed", "run_dir", "study", "cluster"}
    if fixed:
        raise ConfigError(
            f"study.arms.{name}.changes must not set {sorted(fixed)[0]}, which the study sets; leave it out"
        )
    return validate(Recipe, apply_overrides(whole, [*changes, f"seed={seed}"]), source=f"study.arms.{name}.changes")


def reuse(run: Run, earlier: Sequence[Run]) -> None:
    """Give a run every finished stage of an earlier run that was made by the same values; files are linked, not copied."""
    target = run.folder.local_path()
    for depth, (stage, parts, _) in enumerate(_STAGES, start=1):
        if all((target / part).exists() for part in parts):
            continue
        wanted = _values(run.recipe, depth)
        source = next((each for each in earlier if _made(each, stage) and _values(each.recipe, depth) == wanted), None)
        if source is None:
            return
        for part in parts:
            _link_tree(source.folder.local_path(part), target / part)
        if stage is not None:
            run.folder.mark_done(stage, source.folder.done(stage) or {})


def _made(run: Run, stage: str | None) -> bool:
    return run.folder.done(stage or "generate") is not None


def _values(recipe: Recipe, depth: int) -> list[Any]:
    whole = recipe.model_dump(mode="json")
    keys = [key for _, _, keys in _STAGES[:depth] for key in keys]
    return [_value(whole, key) for key in keys]


def _value(mapping: Any, key_path: str) -> Any:
    for key in key_path.split("."):
        mapping = mapping[key]
    return mapping


def _link_tree(source: Path, target: Path) -> None:
    """Link a finished folder into another run; the target appears whole or not at all. Files are never changed in place."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    partial.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
