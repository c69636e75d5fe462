"""Every model and suite that a recipe names: checked before anything runs, and fetched before it is needed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.files import CONFIG_FILE
from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.judging.config import JudgeConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.run.question_source import source_name, splits_judged, writer_of
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder

__all__ = [
    "NamedModel",
    "check_adapters",
    "check_models",
    "check_schedulers",
    "check_sizes",
    "check_trainable",
    "fetch_models",
    "named_models",
]

_FITS_ALL_PX = 32
"""No family needs more, so that a model's configuration is read for other sizes alone."""

Kind = Literal["text-to-image", "autoencoder", "language", "judge"]


@dataclass(frozen=True)
class NamedModel:
    """A model that a recipe names, by the key that names it."""

    key: str
    kind: Kind
    name: str
    revision: str | None = None
    variant: str | None = None


def named_models(recipe: Recipe) -> Iterator[NamedModel]:
    """Yield every model that a run of the recipe opens."""
    yield from _models("model", recipe.model)
    if recipe.data.model:
        yield from _models("data.model", recipe.data.model)
    for name, other in recipe.evaluation.models.items():
        yield from _models(f"evaluation.models.{name}.model", other.model)
    yield from _judge("evaluation.judge", recipe.evaluation.judge)
    if recipe.evaluation.second_judge:
        yield from _judge("evaluation.second_judge", recipe.evaluation.second_judge)
    if recipe.images.selection:
        yield from _judge("images.selection.judge", recipe.images.selection.judge)
    if recipe.experts.nft:
        yield from _judge("experts.nft.judge", recipe.experts.nft.judge)
    if recipe.serving.evaluator_replicas:
        if recipe.serving.judge:
            yield from _judge("serving.judge", recipe.serving.judge)
        for metric, name in recipe.serving.score_models.items():
            yield NamedModel(f"serving.score_models.{metric}", "judge", name)
    # Last, as the miniature's is unpacked when it is first asked for.
    if recipe.prompts.llm.engine == "vllm" and recipe.data.prompts == "llm":
        yield NamedModel("prompts.llm.name", "language", recipe.prompts.llm.name, recipe.prompts.llm.revision)
    if splits_judged(recipe) and source_name(recipe) == "written" and (writer := writer_of(recipe).llm):
        yield NamedModel("questions.writer.llm.name", "language", writer.name, writer.revision)


def check_models(recipe: Recipe) -> None:
    """Raise ModelNotFoundError for the first model that is missing, gated, out of reach or of another kind."""
    for model in dict.fromkeys(named_models(recipe)):
        _configuration(model)


def check_schedulers(recipe: Recipe) -> None:
    """Raise ConfigError where a sampler cannot be set as the recipe says, before a prompt is written."""
    renders = recipe.data.images == "model" and recipe.images.engine == "diffusers"
    samplings = {
        "images": (recipe.data.model or recipe.model, recipe.images.sampling) if renders else None,
        "evaluation": (recipe.model, recipe.evaluation.sampling),
        "serving": (recipe.model, recipe.serving.sampling),
    }
    for section, drawn in samplings.items():
        if drawn is None or not drawn[1].scheduler_config:
            continue
        from selma_ray.models.schedulers import check_sampling

        try:
            check_sampling(*drawn)
        except ModelNotFoundError:
            raise
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from None


def check_sizes(recipe: Recipe) -> None:
    """Raise ConfigError for a size of images that the model cannot draw."""
    drawn_by = recipe.data.model or recipe.model
    renders = recipe.data.images == "model" and recipe.images.engine == "diffusers"
    sizes = {
        "images": (drawn_by, recipe.images.sizes_px if renders else ()),
        "evaluation": (recipe.model, (_size_px(recipe.evaluation.sampling),)),
        "serving": (recipe.model, (_size_px(recipe.serving.sampling),)),
    }
    for section, (model, sizes_px) in sizes.items():
        for width_px, height_px in sizes_px:
            if width_px % _FITS_ALL_PX == height_px % _FITS_ALL_PX == 0:
                continue
            unit_px = _unit_px(model)
            if width_px % unit_px or height_px % unit_px:
                raise ConfigError(
                    f"{section} must have sizes whose sides divide by {unit_px} with {model.name}, got {width_px}x{height_px}; "
                    f"the nearest is {_nearest(width_px, unit_px)}x{_nearest(height_px, unit_px)}"
                )


def _size_px(sampling: SamplingConfig) -> tuple[int, int]:
    return sampling.width_px, sampling.height_px


def _unit_px(model: ModelConfig) -> int:
    """Return what the sides of a model's images divide by; 1 for one that may render, but is of no family."""
    from selma_ray.models.family import open_family

    try:
        return open_family(model).unit_px
    except ModelNotFoundError:
        raise
    except ConfigError:
        return 1


def _nearest(side_px: int, unit_px: int) -> int:
    return max(1, round(side_px / unit_px)) * unit_px


def check_adapters(recipe: Recipe) -> None:
    """Raise ModelNotFoundError where evaluation.models or merging.experts names an adapter that is not there."""
    for name, place in (recipe.merging.experts or {}).items():
        if not Path(place).expanduser().exists():
            raise ModelNotFoundError(
                f"merging.experts.{name} {place} does not exist; name a LoRA file, an adapter's folder or a run's"
            )
    for name, other in recipe.evaluation.models.items():
        if other.adapter_dir is not None and not RunFolder(other.adapter_dir).exists(CONFIG_FILE):
            raise ModelNotFoundError(
                f"evaluation.models.{name}.adapter_dir {other.adapter_dir} must hold {CONFIG_FILE}; name a PEFT adapter's folder"
            )


def check_trainable(recipe: Recipe) -> None:
    """Raise ConfigError where experts cannot be fitted to the recipe's model, though it may render, or could not be merged."""
    from selma_ray.models.families import FAMILIES

    model = _pipeline("model.name", recipe.model)
    index = _configuration(model)
    try:
        pipeline_class = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{model.key} {model.name}: {index} must be a pipeline's index; save the model again"
        ) from None
    if pipeline_class not in FAMILIES:
        raise ConfigError(
            f"{model.key} must be a family that experts can be fitted to ({', '.join(FAMILIES)}), got {model.name} ({pipeline_class})"
        )
    if recipe.experts.lora.targets != LoraSettings().targets:  # every family has the default ones
        _check_targets(recipe)


def _check_targets(recipe: Recipe) -> None:
    """Raise ConfigError where experts.lora.targets names what has no place in the model; it is built without memory."""
    import torch

    from selma_ray.adapters.targets import check_targets
    from selma_ray.models.family import open_family
    from selma_ray.models.published import configured

    with configured(recipe.model) as known, torch.device("meta"):
        denoiser = open_family(known).empty_denoiser()
    check_targets(
        denoiser,
        recipe.experts.lora.targets,
        recipe.model.name,
        linear_alone=recipe.experts.moe is not None,
        rows_apart=recipe.serving.experts,
    )


def fetch_models(recipe: Recipe, tell: Callable[[str, str], None]) -> None:
    """Download every hub model and suite that a recipe names; `tell` is given a key and the folder, one after another.

    Raises ModelNotFoundError for a model that cannot be had, JudgeError for a suite.
    """
    from selma_ray.judging.suites import open_suite
    from selma_ray.models.hub import fetch_model, fetch_pipeline

    check_models(recipe)
    fetched: dict[tuple[str, str | None, str | None], str] = {}
    for model in named_models(recipe):
        place = (model.name, model.revision, model.variant)
        if place not in fetched:
            located = _located(model)
            if Path(located).is_dir():
                fetched[place] = located
            elif model.kind == "text-to-image":
                fetched[place] = str(fetch_pipeline(model.name, model.revision, model.variant))
            else:
                fetched[place] = str(fetch_model(model.name, model.revision))
        tell(f"{model.key} {model.name}", fetched[place])
    prompts = open_suite(recipe.evaluation.suite)
    tell(f"evaluation.suite {recipe.evaluation.suite}", f"{len(prompts)} prompts")


def _models(key: str, model: ModelConfig) -> Iterator[NamedModel]:
    yield _pipeline(f"{key}.name", model)
    if model.vae is not None:
        yield NamedModel(f"{key}.vae", "autoencoder", model.vae)


def _pipeline(key: str, model: ModelConfig) -> NamedModel:
    return NamedModel(key, "text-to-image", model.name, model.revision, model.variant)


def _judge(key: str, judge: JudgeConfig) -> Iterator[NamedModel]:
    yield NamedModel(f"{key}.name", "judge", judge.name, judge.revision)
    if judge.embedder:
        yield NamedModel(f"{key}.embedder", "judge", judge.embedder)


def _located(model: NamedModel) -> str:
    """Return a model's local folder, or its name at the hub; raises ModelNotFoundError for a folder that is not there."""
    from selma_ray.models.locate import locate_judge, locate_llm, locate_part, locate_text_to_image

    if model.kind == "autoencoder":
        return locate_part(model.key, model.name).path
    locate = {"text-to-image": locate_text_to_image, "language": locate_llm, "judge": locate_judge}[model.kind]
    return locate(model.name, model.revision).path


def _configuration(model: NamedModel) -> Path:
    """Return the file that says what a model is; of a hub model it is all that is downloaded."""
    from selma_ray.models.hub import hub_file

    filename = "model_index.json" if model.kind == "text-to-image" else "config.json"
    located = _located(model)
    if Path(located).is_dir():
        return Path(located, filename)
    return hub_file(model.key, model.name, filename, model.revision)
