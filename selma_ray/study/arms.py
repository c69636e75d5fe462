"""The runs of a study: one for each experiment and seed, each in a folder of its own, sharing what earlier ones have made."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selma_ray.config import identity, set_values, validate
from selma_ray.errors import ConfigError
from selma_ray.run.opening import Run
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder
from selma_ray.study.study import Study

__all__ = ["arm_recipe", "check_study", "reuse", "shared_values"]

_UNFINISHED = "sharing"
"""Markers of folders that are being copied, on storage that cannot rename one."""
_BASELINES = ("mixed", "moe")  # what is fitted beside the experts, and does not change them


@dataclass(frozen=True)
class _Part:
    """A folder of a run, the stage that makes it, and the parts of a recipe that decide it, beyond those of the part before."""

    name: str
    stage: str
    keys: tuple[str, ...]
    is_last: bool = True
    """Whether its stage is finished with it."""
    is_judged: Callable[[Recipe], bool] = lambda _: False
    """Whether answers to the recipe's questions decide it too."""


_PARTS = (
    _Part("prompts", "generate", ("skills", "seed", "prompts", "data.prompts", "evaluation.suite"), is_last=False),
    _Part("images", "generate", ("model", "data", "images"), is_judged=lambda recipe: recipe.images.selection is not None),
    _Part("cache", "train", (), is_last=False),
    _Part(
        "experts", "train", ("experts", "evaluation"),
        is_judged=lambda recipe: recipe.experts.nft is not None or recipe.experts.selection is not None,
    ),
)  # fmt: skip


def check_study(study: Study) -> None:
    """Raise ConfigError where an experiment of a study cannot be made."""
    reference, arms = study.config.reference, study.config.arms
    if reference not in arms or "merged" not in arms[reference].models:
        raise ConfigError(f"reference must name one of arms whose merged model is scored, got {reference!r}")
    for name in arms:
        arm_recipe(study, name, study.config.seeds[0])


def arm_recipe(study: Study, name: str, seed: int) -> Recipe:
    """Return the recipe of an experiment, without what it does not score; raises ConfigError where its changes do not fit."""
    arm = study.config.arms[name]
    whole = study.recipe.model_dump(mode="json") | {"run_dir": study.place(name, f"seed={seed}")}
    fixed = {key.partition(".")[0] for key in arm.changes} & {"seed", "run_dir", "cluster"}
    if fixed:
        raise ConfigError(f"arms.{name}.changes must not set {sorted(fixed)[0]}, which the study sets; leave it out")
    made = validate(Recipe, set_values(whole, arm.changes | {"seed": seed}), source=f"arms.{name}.changes")
    missing = [kind for kind in _BASELINES if kind in arm.models and getattr(made.experts, kind) is None]
    if missing:
        raise ConfigError(
            f"arms.{name}.models names {missing[0]}, which experts.{missing[0]} does not ask for; add it to its changes"
        )
    left_out = {kind: None for kind in _BASELINES if kind not in arm.models}
    return made.model_copy(update={"experts": made.experts.model_copy(update=left_out)})


def reuse(run: Run, earlier: Sequence[Run]) -> None:
    """Give a run whatever earlier runs have made by the same values; files are linked where they can be."""
    for part in _PARTS:
        if run.folder.exists(part.name) and not run.folder.exists(_UNFINISHED, part.name):
            continue
        wanted = shared_values(run.recipe, part.name)
        made = (each for each in earlier if _made(each, part))
        source = next((each for each in made if shared_values(each.recipe, part.name) == wanted), None)
        if source is None:
            return
        _share(source.folder, run.folder, part.name)
        if part.is_last and (part.stage != "train" or _has_baselines(source.recipe, run.recipe)):
            run.folder.mark_done(part.stage, source.folder.done(part.stage) or {})


def _made(run: Run, part: _Part) -> bool:
    return run.folder.done(part.stage) is not None and run.folder.exists(part.name)


def _has_baselines(source: Recipe, wanted: Recipe) -> bool:
    """Tell whether one recipe fits the baselines that another asks for."""
    kinds = ((getattr(source.experts, kind), getattr(wanted.experts, kind)) for kind in _BASELINES)
    return all(asked is None or made == asked for made, asked in kinds)


def shared_values(recipe: Recipe, part: str) -> list[Any]:
    """Return the values that decide a part of a run's folder (prompts, images, cache or experts); where work is placed is none."""
    depth = [each.name for each in _PARTS].index(part) + 1
    whole = identity(recipe)
    whole["experts"] = {key: value for key, value in whole["experts"].items() if key not in _BASELINES}
    parts = _PARTS[:depth]
    values = [_value(whole, key) for each in parts for key in each.keys]
    return [*values, whole["questions"] if any(each.is_judged(recipe) for each in parts) else None]


def _value(mapping: Any, key_path: str) -> Any:
    for key in key_path.split("."):
        mapping = mapping[key]
    return mapping


def _share(source: RunFolder, target: RunFolder, name: str) -> None:
    """Give a run a finished folder of another; files are never changed in place, so links do."""
    if source.is_local and target.is_local:
        _link_tree(source.local_path(name), target.local_path(name))
        return
    target.write_bytes(b"", _UNFINISHED, name)
    source.copy_files(target, source.files(name))
    target.delete(_UNFINISHED, name)


def _link_tree(source: Path, target: Path) -> None:
    """Link a finished folder into another run; the target appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    partial.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
