from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError, RunMismatchError
from selma_ray.progress import Progress
from selma_ray.run.evaluate import models_under_test
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from selma_ray.run.stages import STAGES, finished, run_stage

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"


def fail(progress: Progress) -> None:
    pytest.fail(str(progress))


@pytest.fixture
def demo(tmp_path: Path, tiny_pipeline_dir: Path) -> Any:
    """Return a function that loads the demo recipe with overrides, over models that need no conversion."""

    def load(*overrides: Any) -> Any:
        (tmp_path / "llm").mkdir(exist_ok=True)
        (tmp_path / "llm" / "config.json").write_text("{}")
        fixed = [
            f"run_dir={tmp_path / 'run'}",
            f"model.name={tiny_pipeline_dir}",
            f"prompts.llm.name={tmp_path / 'llm'}",
        ]
        return load_recipe(DEMO, [*fixed, *overrides])

    return load


def test_the_resolved_recipe_is_written_before_work_starts(demo: Any) -> None:
    run = open_run(demo("seed=5"))
    assert load_recipe(run.folder.local_path("recipe.yaml")) == run.recipe
    assert run.skill_names == ["common", "paragraphs", "counting", "unusual", "style"]


@pytest.mark.parametrize(
    "override",
    ["images.num_cpus=2", "prompts.max_requests=999", "images.max_renderers=4", "cluster.num_cpus=8", "serving.port=9"],
)
def test_a_run_may_go_on_with_other_resources(demo: Any, override: str) -> None:
    open_run(demo())
    open_run(demo(override))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed=0"),
        ("experts.lora.rank=2", "experts.lora.rank=16"),
        ("skills=[miniature/common]", "skills="),
        ("images.sampling.steps=3", "images.sampling.steps=10"),
    ],
)
def test_a_run_of_another_recipe_is_refused(demo: Any, override: str, key: str) -> None:
    open_run(demo())
    with pytest.raises(RunMismatchError, match=key):
        open_run(demo(override))


def test_a_run_keeps_its_skills_wherever_their_files_are_later(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skill = tmp_path / "mine.yaml"
    skill.write_text("name: mine\ndescription: mine\nmax_words: 9\nseeds: [a red cup]\n")
    monkeypatch.chdir(tmp_path)
    run = open_run(demo("skills=[mine.yaml]"))
    skill.unlink()
    monkeypatch.chdir("/")
    assert open_run(run.folder.uri).skills == run.skills
    assert [each.seeds for each in run.skills] == [("a red cup",)]


def test_a_skill_that_was_changed_since_is_refused(demo: Any, tmp_path: Path) -> None:
    skill = tmp_path / "mine.yaml"
    skill.write_text("name: mine\ndescription: mine\nmax_words: 9\nseeds: [a red cup]\n")
    open_run(demo(f"skills=[{skill}]"))
    skill.write_text("name: mine\ndescription: mine\nmax_words: 8\nseeds: [a red cup]\n")
    with pytest.raises(RunMismatchError, match=r"made with the skill setting mine.max_words=9, its file says 8"):
        open_run(demo(f"skills=[{skill}]"))


def test_a_relative_folder_in_a_submitted_job_is_refused(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "working_dir_files" / "_ray_pkg_0123abcd"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    with pytest.raises(ConfigError, match=r"run_dir must be an absolute path or a URI in a submitted job"):
        open_run(demo("run_dir=runs/demo"))
    assert list(copied.iterdir()) == []


def test_a_finished_stage_is_not_run_again(demo: Any) -> None:
    run = open_run(demo())
    run.folder.mark_done("generate", {"prompts": 7})
    assert run_stage(run, "generate", report=fail) == {"prompts": 7}


@pytest.mark.parametrize("name", list(STAGES)[1:])
def test_a_stage_needs_those_before_it(demo: Any, name: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs the finished stage generate"):
        run_stage(open_run(demo()), name, report=fail)


def test_a_recipe_may_add_models_to_the_evaluation(demo: Any, tiny_pipeline_dir: Path) -> None:
    run = open_run(demo(f"evaluation.models={{other: {{model: {{name: {tiny_pipeline_dir}}}}}}}"))
    models = models_under_test(run)
    assert next(iter(models)) == "base"
    assert list(models)[-2:] == ["merged", "other"]
    assert models["other"].model.name == str(tiny_pipeline_dir)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("{other: {model: {name: ./nowhere}}}", "model folder ./nowhere does not exist"),
        ("{other: {adapter_dir: ./nowhere}}", "evaluation.models.other.adapter_dir ./nowhere must hold"),
        ("{a/b: {}}", "should match pattern"),
    ],
)
def test_models_that_are_not_there_are_named_before_work_starts(demo: Any, models: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_run(demo(f"evaluation.models={models}"))


def test_an_added_model_has_a_name_of_its_own(demo: Any) -> None:
    run = open_run(demo("evaluation.models={merged: {}}"))
    with pytest.raises(ConfigError, match="is the name of a model of this run"):
        models_under_test(run)


def test_an_evaluation_is_unfinished_where_other_results_are_to_be_compared(demo: Any, tmp_path: Path) -> None:
    run = open_run(demo())
    run.folder.mark_done("evaluate", {"models": {}})
    assert finished(run, "evaluate") == {"models": {}}
    compared = open_run(demo(f"evaluation.compare_with={{before: {{run_dir: {tmp_path}}}}}"))
    assert finished(compared, "evaluate") is None
