"""What `serve/app.py` builds from its arguments."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import AdapterError, ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.run.recipe import Recipe
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.served import ServedModels
from selma_ray.storage import RunFolder
from serve import app
from serve.app import ServeArgs, build
from tests.tiny_experts import save_experts


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Return the arguments that `application` is called with."""
    calls: list[tuple] = []
    monkeypatch.setattr(app, "application", lambda *arguments: calls.append(arguments))
    return calls


def arguments(**values: Any) -> ServeArgs:
    return ServeArgs.model_validate({"evaluator_replicas": 0, **values})


def test_a_model_folder_is_served_under_its_name(bound: list[tuple], tiny_pipeline_dir: Path) -> None:
    build(arguments(model={"name": str(tiny_pipeline_dir)}, port="8123"))
    ((models, config, *_),) = bound
    assert models == ServedModels("tiny-sd", ModelConfig(name=str(tiny_pipeline_dir)))
    assert config == ServingConfig(evaluator_replicas=0, port=8123)


def merged_run(folder: Path, tiny_pipeline_dir: Path) -> RunFolder:
    run = RunFolder(str(folder))
    recipe = Recipe.model_validate(
        {"run_dir": "elsewhere", "skills": ["miniature/common"], "serving": {"max_steps": 70, "max_images": 2}}
    )
    run.write_bytes(recipe.as_yaml().encode(), "recipe.yaml")
    folder.joinpath("merged", recipe.merging.name).mkdir(parents=True)
    folder.joinpath("merged", recipe.merging.name, "pipeline").symlink_to(tiny_pipeline_dir)
    for path in ("counting", "counting/checkpoints/step_5"):
        run.write_bytes(b"{}", "experts", path, "adapter_config.json")
    run.mark_done("merge", {})
    return run


def test_a_run_is_served_as_its_recipe_says_but_for_what_is_given(
    bound: list[tuple], tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    run = merged_run(tmp_path, tiny_pipeline_dir)
    build(arguments(run_dir=str(tmp_path), max_images=3))
    build(arguments(run_dir=str(tmp_path), experts=False, model_name="ours"))
    (models, config, *_), (alone, *_) = bound
    assert models.merged.name == run.path("merged", models.name, "pipeline")
    assert (models.base, models.experts) == (ModelConfig(), {"counting": run.path("experts", "counting")})
    assert alone == ServedModels("ours", models.merged)
    assert (config.max_steps, config.max_images, config.evaluator_replicas) == (70, 3, 0)


def test_what_cannot_be_served_is_refused_before_any_replica_starts(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a run's folder, it has no recipe\.yaml"):
        build(arguments(run_dir=str(tmp_path)))
    (tmp_path / "recipe.yaml").write_text(f"run_dir: {tmp_path}\nskills: [coco]\n")
    with pytest.raises(ConfigError, match="holds no merged model; run `selma merge` first"):
        build(arguments(run_dir=str(tmp_path)))
    with pytest.raises(ModelNotFoundError):
        build(arguments(model={"name": "/nowhere"}))
    model = {"name": str(tiny_pipeline_dir)}
    with pytest.raises(ModelNotFoundError):
        build(arguments(model=model, evaluator_replicas=1, judge="/nowhere"))
    with pytest.raises(ConfigError, match="api_keys_file"):
        build(arguments(model=model, host="0.0.0.0", api_keys_file=str(tmp_path / "missing")))


def test_adapters_are_served_beside_the_experts_of_a_run(
    bound: list[tuple], tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    adapters = save_experts(load_pipeline(model, "cpu"), tmp_path / "adapters")
    build(arguments(model=model.model_dump(), adapters={"style": adapters["style"]}))
    ((models, *_),) = bound
    assert (models.base, models.experts) == (model, {"style": adapters["style"]})
    run = merged_run(tmp_path / "run", tiny_pipeline_dir)
    run.write_bytes(
        run.read_bytes("recipe.yaml").replace(b"name: miniature\n", f"name: {tiny_pipeline_dir}\n".encode(), 1),
        "recipe.yaml",
    )
    build(arguments(run_dir=str(tmp_path / "run"), adapters={"style": adapters["style"]}))
    build(arguments(run_dir=str(tmp_path / "run"), adapters={"style": adapters["style"]}, experts=False))
    assert [list(models.experts) for models, *_ in bound[1:]] == [["counting", "style"], ["style"]]
    with pytest.raises(ConfigError, match=r"serving\.adapters\.counting must not have the name of an expert"):
        build(arguments(run_dir=str(tmp_path / "run"), adapters={"counting": adapters["counting"]}))
    with pytest.raises(AdapterError, match=r"^serving\.adapters\.style: /nowhere\.safetensors does not exist"):
        build(arguments(model=model.model_dump(), adapters={"style": "/nowhere.safetensors"}))
