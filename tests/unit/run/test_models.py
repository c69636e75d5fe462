from pathlib import Path

import pytest

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig
from selma_ray.models.published import configured
from selma_ray.run.models import check_models, check_sizes, check_trainable, fetch_models, named_models
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


def names(recipe: str, *overrides: str) -> dict[str, str]:
    return {model.key: model.name for model in named_models(load_recipe(RECIPES / recipe, overrides))}


def test_every_model_that_a_run_opens_is_named() -> None:
    assert names("sdxl.yaml") == {
        "model.name": "stabilityai/stable-diffusion-xl-base-1.0",
        "model.vae": "madebyollin/sdxl-vae-fp16-fix",
        "prompts.llm.name": "Qwen/Qwen3-8B",
        "evaluation.judge.name": "Qwen/Qwen3-VL-8B-Instruct",
        "serving.judge.name": "Qwen/Qwen3-VL-8B-Instruct",
    }
    more = names(
        "sdxl.yaml", "images.per_prompt=2", "images.selection.judge=owner/judge", "data.model.name=owner/weak",
        "evaluation.models={other: {model: {name: owner/other}}}", "serving.score_models={clipscore: owner/clip}",
        "evaluation.judge.embedder=owner/sentences",
    )  # fmt: skip
    assert more.keys() - names("sdxl.yaml").keys() == {
        "images.selection.judge.name", "questions.writer.llm.name", "data.model.name", "evaluation.models.other.model.name",
        "serving.score_models.clipscore", "evaluation.judge.embedder",
    }  # fmt: skip
    assert "prompts.llm.name" not in names("sdxl.yaml", "prompts.llm.engine=free")
    assert "serving.judge.name" not in names("sdxl.yaml", "serving.evaluator_replicas=0")


@pytest.mark.parametrize(
    "recipe",
    [
        "sd14",
        "sd2",
        "sdxl",
        "sd35",
        "flux",
        "zimage",
        "flux2_klein",
        "qwen_image",
        "sana",
        "paper_sd14",
        "paper_sdxl",
        "workstation",
    ],
)
def test_a_recipe_whose_models_are_out_of_reach_is_refused_before_anything_is_written(
    recipe: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFoundError, match=r"model\.name .* is not in HF_HOME, and the hub cannot be reached"):
        open_run(load_recipe(RECIPES / f"{recipe}.yaml", [f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_only_renders_is_refused_where_experts_are_to_be_fitted(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    recipe = load_recipe(RECIPES / "demo.yaml", [f"model.name={tmp_path}"])
    free = ["prompts.llm.engine=free", "questions.source=whole"]
    check_models(load_recipe(RECIPES / "demo.yaml", [f"model.name={tmp_path}", *free]))
    with pytest.raises(
        ConfigError, match=r"model\.name must be a family that experts can be fitted to .*KandinskyPipeline"
    ):
        check_trainable(recipe)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (
            ["images.buckets_px=[[520, 512]]"],
            r"images must .* divide by 16 with .*, got 520x512; the nearest is 512x512",
        ),
        (["evaluation.sampling.height_px=40"], r"evaluation must .* divide by 16 .*, got 64x40; the nearest is 64x32"),
        (["serving.sampling.width_px=8"], r"serving must .* divide by 16 .*, got 8x64; the nearest is 16x64"),
    ],
)
def test_sizes_that_the_model_cannot_draw_are_refused(overrides: list[str], refusal: str) -> None:
    with configured(ModelConfig(name="black-forest-labs/FLUX.1-dev")) as flux:
        drawn_by_flux = [f"model.name={flux.name}", "images.buckets_px=[[48, 16]]", *overrides]
        with pytest.raises(ConfigError, match=refusal):
            check_sizes(load_recipe(RECIPES / "demo.yaml", drawn_by_flux))
    check_sizes(load_recipe(RECIPES / "demo.yaml", overrides))


def test_what_is_on_this_machine_needs_no_fetching() -> None:
    told = []
    recipe = load_recipe(RECIPES / "demo.yaml", ["prompts.llm.engine=free"])
    fetch_models(recipe, lambda what, place: told.append((what, place)))
    assert [what for what, _ in told] == [
        "model.name miniature", "evaluation.judge.name miniature", "images.selection.judge.name miniature",
        "serving.judge.name miniature", "evaluation.suite miniature",
    ]  # fmt: skip
    assert all(Path(place).is_dir() for _, place in told[:-1])
    assert told[-1][1] == "500 prompts"
