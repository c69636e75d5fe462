"""A run: a recipe, its folder and its skills. `open_run` is the one way to open it, by its recipe or by its folder."""

from dataclasses import dataclass
from functools import cached_property

import yaml

from selma_ray.config import first_difference, identity, validate
from selma_ray.errors import ConfigError, RunMismatchError
from selma_ray.models.config import ModelConfig
from selma_ray.run.models import check_adapters, check_models, check_schedulers
from selma_ray.run.question_source import check_questions_can_be_had
from selma_ray.run.recipe import Recipe
from selma_ray.skills import Skill, load_skills
from selma_ray.storage import RunFolder

__all__ = ["Run", "open_run"]

_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """A recipe and its folder."""

    recipe: Recipe
    folder: RunFolder

    @cached_property
    def skills(self) -> tuple[Skill, ...]:
        """Return the skills, in the recipe's order; raises SkillError where a file is not there any more."""
        return tuple(load_skills(self.recipe.skills))

    @property
    def skill_names(self) -> list[str]:
        """Return the names of the skills, in the recipe's order."""
        return [skill.name for skill in self.skills]

    @property
    def merged_model(self) -> ModelConfig:
        """Return the merged model: the recipe's model with the baked pipeline in its place."""
        pipeline = self.folder.path("merged", self.recipe.merging.name, "pipeline")
        return self.recipe.model.model_copy(update={"name": pipeline, "revision": None, "variant": None})


def open_run(source: Recipe | str) -> Run:
    """Open a run by its recipe, whose folder is made, or by the path or URI of a folder that is there, which is only read.

    A recipe's models, judges and skills are checked first. Raises RunMismatchError where the folder was made with another recipe,
    ConfigError where a folder holds no run.
    """
    if isinstance(source, str):
        folder = RunFolder(source)
        recipe = _written_recipe(folder)
        if recipe is None:
            raise ConfigError(f"{source} must be a run's folder, it has no {_RECIPE}; name the run_dir of a recipe")
        return Run(recipe.model_copy(update={"run_dir": source}), folder)
    run = Run(source, RunFolder(source.run_dir))
    _check(source, run.skills)
    folder = run.folder
    written = _written_recipe(folder)
    if written is None:
        folder.write_bytes(source.as_yaml().encode(), _RECIPE)
    else:
        _refuse_other_recipe(written, source, folder)
    return run


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


def _check(recipe: Recipe, skills: tuple[Skill, ...]) -> None:
    """Raise ConfigError where the recipe names a skill, a model or a judge that is not there."""
    from selma_ray.prompts.llm import check_llm

    unknown = set(recipe.merging.weights or {}) - {skill.name for skill in skills}
    if unknown:
        raise ConfigError(
            f"merging.weights names {sorted(unknown)[0]!r}, which is no skill of the recipe; fix the name"
        )
    check_adapters(recipe)
    check_models(recipe)
    check_schedulers(recipe)
    check_llm(recipe.prompts.llm)
    check_questions_can_be_had(recipe)


def _refuse_other_recipe(written: Recipe, recipe: Recipe, folder: RunFolder) -> None:
    difference = first_difference(identity(written), identity(recipe))
    if difference:
        key, old, new = difference
        raise RunMismatchError(
            f"{folder.uri} was made with {key}={old!r}, this recipe says {new!r}; set run_dir to a new folder or undo the change"
        )
