"""A run: a recipe, its folder and its skills. `open_run` is the one way to open it, by its recipe or by its folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import yaml

from selma_ray.config import first_difference, identity, validate
from selma_ray.errors import ConfigError, RunMismatchError
from selma_ray.models.config import ModelConfig
from selma_ray.run.models import check_adapters, check_models, check_schedulers, check_sizes
from selma_ray.run.question_source import check_questions_can_be_had
from selma_ray.run.recipe import Recipe
from selma_ray.skills import Skill, load_skills
from selma_ray.storage import RunFolder
from selma_ray.tracking.opening import check_trackers

__all__ = ["Run", "open_run"]

_RECIPE = "recipe.yaml"
_SKILLS = "skills.yaml"


@dataclass(frozen=True)
class Run:
    """A recipe and its folder."""

    recipe: Recipe
    folder: RunFolder

    @cached_property
    def skills(self) -> tuple[Skill, ...]:
        """Return the skills, in the recipe's order, as the run's folder keeps them; raises SkillError where neither it nor a file does."""
        return _kept_skills(self.folder) or tuple(load_skills(self.recipe.skills))

    @property
    def skill_names(self) -> list[str]:
        """Return the names of the skills, in the recipe's order."""
        return [skill.name for skill in self.skills]

    @property
    def merged_parts(self) -> tuple[str, ...]:
        """Return the merged model's folder, relative to the run's: that of the round that is kept."""
        kept = (self.folder.done("merge") or {}).get("kept_round", 1)
        of_round = () if kept == 1 else ("rounds", str(kept))
        return (*of_round, "merged", self.recipe.merging.name)

    @property
    def merged_model(self) -> ModelConfig:
        """Return the merged model: the recipe's model with the baked pipeline in its place."""
        pipeline = self.folder.path(*self.merged_parts, "pipeline")
        return self.recipe.model.model_copy(update={"name": pipeline, "revision": None, "variant": None})


def open_run(source: Recipe | str, make: bool = True) -> Run:
    """Open a run by its recipe, whose folder is made unless `make` is false, or by the path or URI of a folder, which is only read.

    A recipe's models, judges and skills are checked first. Raises RunMismatchError where the folder was made with another recipe or with
    other skills, ConfigError where a folder holds no run, or would be lost.
    """
    if isinstance(source, str):
        folder = RunFolder(source)
        recipe = _written_recipe(folder)
        if recipe is None:
            raise ConfigError(f"{source} must be a run's folder, it has no {_RECIPE}; name the run_dir of a recipe")
        return Run(recipe.model_copy(update={"run_dir": source}), folder)
    folder = RunFolder(source.run_dir)
    _refuse_package_cache(folder)
    if not (make or folder.exists(_RECIPE)):
        raise ConfigError(
            f"run_dir {folder.uri} must be a run's folder, it has no {_RECIPE}; fix the path, or run `selma run` first"
        )
    skills = tuple(load_skills(source.skills))
    _check(source, skills)
    written = _written_recipe(folder)
    if written is not None:
        _refuse_other_recipe(written, source, folder)
    kept = _kept_skills(folder)
    if kept is not None:
        _refuse_other_skills(kept, skills, folder)
    else:
        content = [skill.model_dump(mode="json") for skill in skills]
        folder.write_bytes(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(), _SKILLS)
    if written is None:  # last, as it makes the folder a run's
        folder.write_bytes(source.as_yaml().encode(), _RECIPE)
    return Run(source, folder)


def _written_recipe(folder: RunFolder) -> Recipe | None:
    """Return the recipe that a folder was made with; None where it holds none."""
    if not folder.exists(_RECIPE):
        return None
    place = folder.path(_RECIPE)
    try:
        mapping = yaml.safe_load(folder.read_bytes(_RECIPE))
        return validate(Recipe, mapping, source=place)
    except (ConfigError, yaml.YAMLError) as error:
        raise RunMismatchError(f"{error}: made by another version; set run_dir to a new folder") from None


def _kept_skills(folder: RunFolder) -> tuple[Skill, ...] | None:
    """Return the skills that a folder was made with, wherever their files are now; None where it holds none."""
    if not folder.exists(_SKILLS):
        return None
    place = folder.path(_SKILLS)
    try:
        return tuple(validate(Skill, mapping, source=place) for mapping in yaml.safe_load(folder.read_bytes(_SKILLS)))
    except (ConfigError, yaml.YAMLError, TypeError) as error:
        raise RunMismatchError(f"{error}: made by another version; set run_dir to a new folder") from None


def _refuse_other_skills(kept: tuple[Skill, ...], skills: tuple[Skill, ...], folder: RunFolder) -> None:
    before, now = ({skill.name: skill.model_dump(mode="json") for skill in each} for each in (kept, skills))
    difference = first_difference(before, now)
    if difference:
        key, old, new = difference
        raise RunMismatchError(
            f"{folder.uri} was made with the skill setting {key}={old!r}, its file says {new!r} now; set run_dir to a new folder or undo "
            "the change"
        )


def _refuse_package_cache(folder: RunFolder) -> None:
    """Refuse a relative run_dir in a submitted job: the job runs in Ray's copy of the working directory."""
    if folder.is_local and any(part.startswith("_ray_pkg_") for part in PurePosixPath(folder.uri).parts):
        raise ConfigError(
            f"run_dir must be an absolute path or a URI in a submitted job, got {folder.uri}, which is in Ray's cache of packages: it is "
            "deleted when space is short, and another version of the code gets another; set run_dir=/shared/… or run_dir=s3://…"
        )


def _check(recipe: Recipe, skills: tuple[Skill, ...]) -> None:
    """Raise ConfigError where the recipe names a skill, a model or a judge that is not there."""
    from selma_ray.prompts.llm import check_llm

    merged = set(recipe.merging.experts or ()) or {skill.name for skill in skills}
    unknown = set(recipe.merging.weights or {}) - merged
    if unknown:
        kind = "adapter of merging.experts" if recipe.merging.experts else "skill of the recipe"
        raise ConfigError(f"merging.weights names {sorted(unknown)[0]!r}, which is no {kind}; fix the name")
    check_adapters(recipe)
    check_models(recipe)
    check_schedulers(recipe)
    check_sizes(recipe)
    check_trackers(recipe.experts.trackers, RunFolder(recipe.run_dir))
    check_llm(recipe.prompts.llm)
    check_questions_can_be_had(recipe)


def _refuse_other_recipe(written: Recipe, recipe: Recipe, folder: RunFolder) -> None:
    difference = first_difference(identity(written), identity(recipe))
    if difference:
        key, old, new = difference
        raise RunMismatchError(
            f"{folder.uri} was made with {key}={old!r}, this recipe says {new!r}; set run_dir to a new folder or undo the change"
        )
