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


def merged_run(folder: Path, tiny_pipeline_dir: Path, **serving: Any) -> RunFolder:
    run = RunFolder(str(folder))
    serving = {"max_steps": 70, "max_images": 2, **serving}
    recipe = Recipe.model_validate({"run_dir": "elsewhere", "skills": ["miniature/common"], "serving": serving})
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


def test_runs_are_served_beside_the_first_by_name(bound: list[tuple], tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    sampling = {"steps": 4, "width_px": 128, "height_px": 128}
    merged_run(tmp_path / "own", tiny_pipeline_dir)
    other = merged_run(tmp_path / "other", tiny_pipeline_dir, sampling=sampling, max_images=7)
    models = {"large": str(tmp_path / "other")}
    build(arguments(run_dir=str(tmp_path / "own"), models=models))
    *_, hosted = bound[0]
    assert list(hosted) == ["large"]
    served, config = hosted["large"].models, hosted["large"].config
    assert served.merged.name == other.path("merged", "merged", "pipeline")
    assert served.names.all() == ("large", "large/base", "large/counting")
    assert (config.sampling.steps, config.longest_side_px) == (4, 192), "as its own recipe says"
    assert (config.max_images, config.max_steps, config.models) == (2, 70, {}), "as the service says"


@pytest.mark.parametrize(
    ("name", "sampling", "line"),
    [
        (
            "counting",
            {},
            r"^serving\.models\.counting must have another name: counting is a model of the service's own run",
        ),
        ("slow", {"steps": 90}, r"serving\.models\.slow.*max_steps must be at least sampling\.steps, which is 90"),
    ],
)
def test_a_run_that_cannot_stand_beside_the_first_is_refused(
    name: str, sampling: dict[str, Any], line: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    merged_run(tmp_path / "own", tiny_pipeline_dir)
    merged_run(tmp_path / "other", tiny_pipeline_dir, sampling=sampling, max_steps=100)
    with pytest.raises(ConfigError, match=line):
        build(arguments(run_dir=str(tmp_path / "own"), models={name: str(tmp_path / "other")}))


def test_a_run_without_a_merged_model_is_refused_by_its_key(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    merged_run(tmp_path / "own", tiny_pipeline_dir)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"must be a run's folder, it has no recipe\.yaml"):
        build(arguments(run_dir=str(tmp_path / "own"), models={"other": str(tmp_path / "other")}))
    (tmp_path / "other" / "recipe.yaml").write_text("run_dir: elsewhere\nskills: [coco]\n")
    with pytest.raises(ConfigError, match=r"^serving\.models\.other .* holds no merged model"):
        build(arguments(run_dir=str(tmp_path / "own"), models={"other": str(tmp_path / "other")}))
