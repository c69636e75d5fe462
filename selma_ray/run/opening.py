"""A run: a recipe, its folder and its skills, opened and checked before anything works on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selma_ray.errors import ConfigError, ModelNotFoundError, RunMismatchError
from selma_ray.models.config import ModelConfig
from selma_ray.run.recipe import Recipe
from selma_ray.skills import Skill, load_skills
from selma_ray.storage import RunFolder

__all__ = ["Run", "open_run"]

# Keys that say where and how fast a run works, not what comes out of it: they may change between two starts of a run.
_PLACEMENT_SECTIONS = ("run_dir", "cluster", "serving", "study")
_PLACEMENT_KEYS = {
    "num_cpus", "num_gpus", "min_replicas", "max_replicas", "kv_cache_gb", "min_renderers", "max_renderers", "renderers",
    "cpus_per_worker", "encoders", "gpus_per_worker", "max_concurrent", "max_attempts", "max_failures", "max_failed_fraction",
    "max_requests", "max_restarts", "max_retries", "api_key_env", "license", "latency_s",
    "judges", "compare_with", "allow_other_judge",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and its skills, checked against one another."""

    recipe: Recipe
    folder: RunFolder
    skills: tuple[Skill, ...]

    @property
    def skill_names(self) -> list[str]:
        """Return the names of the skills, in the recipe's order."""
        return [skill.name for skill in self.skills]

    @property
    def merged_model(self) -> ModelConfig:
        """Return the merged model: the recipe's model with the baked pipeline in its place."""
        pipeline = self.folder.path("merged", self.recipe.merging.name, "pipeline")
        return self.recipe.model.model_copy(update={"name": pipeline, "revision": None, "variant": None})


def open_run(recipe: Recipe) -> Run:
    """Check everything a recipe names, then write it to its run folder; a run folder of another recipe is refused."""
    from selma_ray.models.locate import locate_judge, locate_text_to_image
    from selma_ray.prompts.llm import check_llm

    skills = tuple(load_skills(recipe.skills))
    unknown = set(recipe.merging.weights or {}) - {skill.name for skill in skills}
    if unknown:
        raise ConfigError(
            f"merging.weights names {sorted(unknown)[0]!r}, which is no skill of the recipe; mend the name"
        )
    for model in filter(None, (recipe.model, recipe.data.model)):
        locate_text_to_image(model.name, model.revision)
    _check_other_models(recipe)
    locate_judge(recipe.evaluation.judge.name)
    if recipe.images.selection:
        locate_judge(recipe.images.selection.judge)
    check_llm(recipe.prompts.llm)
    folder = RunFolder(recipe.run_dir)
    if folder.exists("recipe.yaml"):
        _refuse_other_recipe(yaml.safe_load(folder.read_bytes("recipe.yaml")), recipe, folder)
    else:
        folder.write_bytes(recipe.as_yaml().encode(), "recipe.yaml")
    return Run(recipe, folder, skills)


def _check_other_models(recipe: Recipe) -> None:
    """Raise ModelNotFoundError where evaluation.models names a pipeline or an adapter that is not there."""
    from selma_ray.models.locate import locate_text_to_image

    for name, other in recipe.evaluation.models.items():
        locate_text_to_image(other.model.name, other.model.revision)
        if other.adapter_dir is not None and not Path(other.adapter_dir, "adapter_config.json").is_file():
            raise ModelNotFoundError(
                f"evaluation.models.{name}.adapter_dir {other.adapter_dir} must hold adapter_config.json; name a PEFT adapter's folder"
            )


def _refuse_other_recipe(before: dict[str, Any], recipe: Recipe, folder: RunFolder) -> None:
    now = yaml.safe_load(recipe.as_yaml())
    for section in now.keys() | before.keys():
        if section in _PLACEMENT_SECTIONS:
            continue
        difference = _first_difference(before.get(section), now.get(section), section)
        if difference:
            key, old, new = difference
            raise RunMismatchError(
                f"{folder.uri} was made with {key}={old!r}, this recipe says {new!r}; set run_dir to a new folder or undo the change"
            )


def _first_difference(before: Any, now: Any, key: str) -> tuple[str, Any, Any] | None:
    if key.rpartition(".")[2] in _PLACEMENT_KEYS:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        nested = (
            _first_difference(before.get(name), now.get(name), f"{key}.{name}")
            for name in sorted(before.keys() | now.keys())
        )
        return next(filter(None, nested), None)
    return None if before == now else (key, before, now)
