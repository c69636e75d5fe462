"""The recipe of a run: one file, composed of each stage's own config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from selma_ray.cluster.config import ClusterConfig
from selma_ray.config import Placement, StrictModel, apply_overrides, read_yaml, validate
from selma_ray.errors import ConfigError
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.experts.config import ExpertsConfig
from selma_ray.images.config import ImagesConfig
from selma_ray.judging.config import QuestionsConfig
from selma_ray.merging.config import MergingConfig
from selma_ray.models.config import ModelConfig
from selma_ray.prompts.config import PromptsConfig
from selma_ray.run.published import recipe_path
from selma_ray.serving.config import ServingConfig

__all__ = ["DataConfig", "Recipe", "load_recipe"]


class DataConfig(StrictModel):
    """Where the training data come from; SELMA's ablations change it (sections 5.3 and 5.4)."""

    prompts: Literal["llm", "ground_truth"] = "llm"
    """`ground_truth` takes captions of the miniature's own scenes instead of asking the LLM."""
    images: Literal["model", "ground_truth"] = "model"
    """`ground_truth` draws the miniature's scenes instead of rendering them."""
    model: ModelConfig | None = None
    """The model that renders training images, such as a weaker one; default: the model that is improved."""
    prompts_each_round: Literal["kept", "new"] = "kept"
    """Whether the rounds after the first draw the first one's prompts again, or have new ones written."""


class Recipe(StrictModel):
    """Everything a run depends on."""

    run_dir: Placement[str]
    """The run's folder: a path, s3://… or gs://…"""
    seed: int = Field(default=0, ge=0)
    """The seed that every other seed is derived from."""
    skills: tuple[str, ...] = Field(min_length=1)
    """Names of packaged skills, or paths of skill files."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of all stages up to the merge, which draws the next round's images; they end early where the dev split no longer gains."""
    model: ModelConfig = ModelConfig()
    """The text-to-image model to improve."""
    data: DataConfig = DataConfig()
    """Where the training data come from."""
    prompts: PromptsConfig = PromptsConfig()
    """Stage 1: the LLM writes prompts."""
    images: ImagesConfig = ImagesConfig()
    """Stage 2: the model renders them."""
    questions: QuestionsConfig = QuestionsConfig()
    """Where the questions about the run's own captions come from, wherever their images are judged."""
    experts: ExpertsConfig = ExpertsConfig()
    """Stage 3: one LoRA expert per skill."""
    merging: MergingConfig = MergingConfig()
    """Stage 4: the experts become one model."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Stage 5: base, experts and merged model are scored."""
    serving: Placement[ServingConfig] = ServingConfig()
    """Stage 6: the merged model answers HTTP requests."""
    cluster: Placement[ClusterConfig] = ClusterConfig()
    """How the run reaches Ray."""

    @field_validator("skills")
    @classmethod
    def _no_skill_twice(cls, skills: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(skills)) != len(skills):
            raise ValueError("must name each skill once")
        return skills

    @model_validator(mode="after")
    def _selection_has_prompts(self) -> "Recipe":
        selection = self.experts.selection
        if selection and selection.suite is None and self.prompts.dev_fraction == 0:
            raise ValueError("experts.selection needs prompts.dev_fraction above 0, or a suite of its own")
        return self

    @model_validator(mode="after")
    def _preferences_have_pairs(self) -> "Recipe":
        images, drawn = self.images, self.data.images == "ground_truth"
        if self.experts.dpo and (images.selection is None or images.per_prompt < 2 or drawn):
            got = f"images.selection={'null' if images.selection is None else 'set'}, images.per_prompt={images.per_prompt}"
            raise ValueError(
                "experts.dpo needs scored images to make pairs of: images.selection, images.per_prompt of at least 2 and "
                f"data.images=model, got {got}, data.images={self.data.images}; set them, or leave experts.dpo out"
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> "Recipe":
        if self.rounds == 1:
            return self
        if self.experts.nft:
            raise ValueError(
                f"rounds must be 1 with experts.nft, whose experts draw rounds of their own, got {self.rounds}"
            )
        if self.data.images == "ground_truth":
            raise ValueError(f"rounds must be 1 with data.images=ground_truth, which no merge draws, got {self.rounds}")
        if self.prompts.dev_fraction == 0:
            raise ValueError("rounds needs prompts.dev_fraction above 0: they end where the dev split no longer gains")
        return self

    @model_validator(mode="after")
    def _drawn_images_have_one_size(self) -> "Recipe":
        if self.images.buckets_px and self.data.images == "ground_truth":
            raise ValueError(
                "images.buckets_px must be left out with data.images=ground_truth, whose scenes are drawn at one size"
            )
        return self

    @model_validator(mode="after")
    def _fused_images_have_one_size(self) -> "Recipe":
        if self.experts.fused and self.images.buckets_px:
            raise ValueError(
                "experts.fused must be false with images.buckets_px: experts in one batch need images of one size"
            )
        return self

    def as_yaml(self) -> str:
        """Return the resolved recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, by its path or URI or a published one by its name, and apply `key.path=value` overrides.

    A file that says `extends: OTHER.yaml`, a path relative to its own folder or a published name, changes that recipe: mappings are
    merged key by key, everything else replaces what stood there. Raises ConfigError with one line.
    """
    from selma_ray.local_copies import local_copy

    mapping = _read_recipe(local_copy(recipe_path(path)))
    return validate(Recipe, apply_overrides(mapping, overrides, Recipe), source=str(path))


def _read_recipe(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.expanduser().absolute()
    mapping = read_yaml(path)
    if "arms" in mapping:
        raise ConfigError(
            f"{path} is a study, not a recipe; run `selma study {path}`, or name the recipe that it names"
        )
    other = mapping.pop("extends", None)
    if other is None:
        return mapping
    if path in extending:
        raise ConfigError(f"{path}: extends must not lead back to the file itself; name another recipe")
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends must name one recipe file, got {other!r}")
    return _merged(_read_recipe(Path(recipe_path(other, beside=path.parent)), (*extending, path)), mapping)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = below.keys() & above.keys()
    nested = {
        key: _merged(below[key], above[key])
        for key in both
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **nested}
