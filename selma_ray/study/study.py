"""A study opened: its file, and the recipe that its experiments change."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selma_ray.config import apply_overrides, read_yaml, validate
from selma_ray.errors import ConfigError
from selma_ray.run.published import recipe_path
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.storage import RunFolder
from selma_ray.study.config import StudyConfig

__all__ = ["Study", "is_study", "load_study"]

_PREFIX = "study."
_FOLDER = "study"


@dataclass(frozen=True)
class Study:
    """Experiments around a recipe, all within the folder of the recipe's run."""

    config: StudyConfig
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        """Return the folder of the recipe's run."""
        return RunFolder(self.recipe.run_dir)

    @property
    def suite(self) -> str:
        """Return the suite that models are scored on."""
        return self.config.suite or self.recipe.evaluation.suite

    def place(self, *parts: str) -> str:
        """Return the full path of `parts` within the study."""
        return self.folder.path(_FOLDER, *parts)

    @property
    def results(self) -> RunFolder:
        """Return the folder of what was found on the suite: scores, tables and pictures."""
        return RunFolder(self.place(*([f"suite={Path(self.config.suite).stem}"] if self.config.suite else [])))

    def scores(self, seed: int, guidance_scale: float) -> RunFolder:
        """Return the folder of a seed's scored images at a guidance scale."""
        return RunFolder(self.results.path("scores", f"seed={seed}", f"guidance={guidance_scale:g}"))


def is_study(path: str | Path) -> bool:
    """Tell whether a file is a study, not a recipe."""
    return "arms" in read_yaml(Path(recipe_path(path)))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and its recipe, and apply overrides: `study.key=value` to the study, every other to the recipe.

    Raises ConfigError, with one line, where either breaks a rule.
    """
    path = Path(recipe_path(path))
    mapping = read_yaml(path)
    if "arms" not in mapping:
        raise ConfigError(f"{path} names no experiments; name a study, such as jobs/recipes/miniature_study.yaml")
    of_study = [each.removeprefix(_PREFIX) for each in overrides if each.startswith(_PREFIX)]
    config = validate(StudyConfig, apply_overrides(mapping, of_study, StudyConfig), source=str(path))
    place = [f"run_dir={config.run_dir}"] if config.run_dir else []
    of_recipe = [each for each in overrides if not each.startswith(_PREFIX)]
    return Study(config, load_recipe(recipe_path(config.recipe, beside=path.parent), [*place, *of_recipe]))
