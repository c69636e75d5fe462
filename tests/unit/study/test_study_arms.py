import json

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.experts.config import ExpertsConfig, MixedConfig
from selma_ray.run.opening import Run, open_run
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.study.arms import arm_recipe, check_study, reuse

ARMS = {
    "selma": {"title": "SELMA"},
    "factors": {"title": "mean of factors", "changes": {"merging.method": "average_factors"}},
    "longer": {"title": "longer", "changes": {"experts.steps": 7}},
    "guided": {"title": "images at guidance 1", "changes": {"images.sampling.guidance_scale": 1.0}},
    "all": {"title": "all", "changes": {"experts.mixed": {"ranks": [4]}}, "models": ["experts", "mixed", "merged"]},
    "mixed": {"title": "one LoRA", "changes": {"experts.mixed": {"ranks": [4]}}, "models": ["mixed"]},
    "moe": {"title": "MoE-LoRA", "changes": {"experts.moe": {"steps": 3}}, "models": ["moe"]},
}


@pytest.fixture
def recipe(tmp_path, tiny_pipeline_dir):
    """Return a function that makes a recipe with a study, its models in place."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")

    def make(**study) -> Recipe:
        whole = {
            "run_dir": str(tmp_path / "run"), "skills": ["miniature/common", "miniature/counting"],
            "model": {"name": str(tiny_pipeline_dir)}, "prompts": {"llm": {"name": str(tmp_path / "llm")}},
            "evaluation": {"suite": "miniature"}, "study": {"arms": ARMS, **study},
        }  # fmt: skip
        return validate(Recipe, whole, "test")

    return make


@pytest.fixture
def opened(recipe):
    """Return a function that opens the run of an experiment at seed 0."""
    return lambda name, seed=0: open_run(arm_recipe(recipe(), name, seed))


def finish(run: Run, *stages: str) -> None:
    """Leave a run's folder as finished stages do, with files that say which run made them."""
    parts = {"generate": ("prompts", "images"), "train": ("cache", "experts")}
    for stage in stages:
        for part in parts[stage]:
            run.folder.write_bytes(run.folder.uri.encode(), part, "common", "file")
        run.folder.mark_done(stage, {"made_by": run.folder.uri})


def test_an_experiment_is_the_recipe_with_its_changes_and_the_study_s_seed(recipe, tmp_path):
    made = arm_recipe(recipe(), "factors", 2)
    assert (made.merging.method, made.seed, made.study) == ("average_factors", 2, None)
    assert made.run_dir == str(tmp_path / "run" / "study" / "factors" / "seed=2")
    assert made.experts == recipe().experts


def test_experiments_that_cannot_be_made_are_named_before_any_work(recipe):
    with pytest.raises(ConfigError, match=r"study\.arms\.new\.changes: experts\.step is not a known key; did you mean"):
        check_study(recipe(arms=ARMS | {"new": {"title": "x", "changes": {"experts.step": 1}}}))
    with pytest.raises(ConfigError, match=r"must not set seed"):
        check_study(recipe(arms=ARMS | {"new": {"title": "x", "changes": {"seed": 1}}}))
    with pytest.raises(ConfigError, match=r"study\.reference must name one of"):
        check_study(recipe(reference="none"))


@pytest.mark.parametrize("recipe", ["miniature", "miniature_more"])
def test_the_miniature_s_experiments_can_be_made(recipe):
    assert check_study(load_recipe(f"jobs/recipes/{recipe}.yaml")).reference == "selma"


def test_a_recipe_without_a_study_says_so(tmp_path):
    with pytest.raises(ConfigError, match="study names no experiments"):
        check_study(load_recipe("jobs/recipes/demo.yaml"))


def test_what_an_earlier_experiment_made_by_the_same_values_is_linked(opened):
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    for part in ("prompts", "images", "cache", "experts"):
        assert run.folder.local_path(part, "common", "file").samefile(earlier.folder.local_path(part, "common", "file"))
    assert run.folder.done("train") == {"made_by": earlier.folder.uri}


@pytest.mark.parametrize(("name", "shared"), [("longer", {"prompts", "images", "cache"}), ("guided", {"prompts"})])
def test_what_other_values_would_change_is_made_again(opened, name, shared):
    earlier, run = opened("selma"), opened(name)
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    there = {part for part in ("prompts", "images", "cache", "experts") if run.folder.local_path(part).exists()}
    assert there == shared
    assert (run.folder.done("generate") is not None) == ("images" in shared)


def test_other_seeds_and_unfinished_runs_are_not_reused(opened):
    other_seed, unfinished, run = opened("selma", 1), opened("selma"), opened("factors")
    finish(other_seed, "generate", "train")
    unfinished.folder.write_bytes(b"", "prompts", "common", "file")
    reuse(run, [other_seed, unfinished])
    assert not run.folder.local_path("prompts").exists()


def test_own_work_stays_when_an_experiment_goes_on(opened):
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate")
    finish(run, "generate")
    reuse(run, [earlier])
    assert json.loads(json.dumps(run.folder.done("generate"))) == {"made_by": run.folder.uri}


def test_baselines_are_made_only_where_they_are_scored(recipe):
    with_mixed = recipe().model_copy(update={"experts": ExpertsConfig(mixed=MixedConfig(ranks=(4,)))})
    assert arm_recipe(with_mixed, "selma", 0).experts.mixed is None
    assert arm_recipe(with_mixed, "mixed", 0).experts.mixed is not None
    with pytest.raises(ConfigError, match=r"study\.arms\.new\.models names moe, which experts\.moe does not ask for"):
        check_study(recipe(arms=ARMS | {"new": {"title": "x", "models": ["moe"]}}))


@pytest.mark.parametrize(
    ("source", "name", "finished"),
    [("all", "selma", True), ("all", "mixed", True), ("selma", "moe", False), ("selma", "all", False)],
)
def test_experts_are_shared_and_baselines_that_are_not_there_are_fitted(opened, source, name, finished):
    earlier, run = opened(source), opened(name)
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    assert run.folder.local_path("experts", "common", "file").samefile(
        earlier.folder.local_path("experts", "common", "file")
    )
    assert (run.folder.done("train") is not None) == finished


def test_encoded_examples_are_shared_where_the_images_are(opened):
    earlier, run = opened("selma"), opened("longer")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    assert run.folder.exists("cache")
    assert not run.folder.exists("experts")


def test_an_experiment_that_was_stopped_while_it_took_over_goes_on(opened):
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    run.folder.delete("experts")
    run.folder.delete("done", "train.json")
    reuse(run, [earlier])
    assert run.folder.done("train") == {"made_by": earlier.folder.uri}


def test_images_may_come_from_another_model(recipe, tiny_pipeline_dir, tmp_path):
    arms = ARMS | {
        "weak": {"title": "images of a weaker model", "changes": {"data.model.name": str(tiny_pipeline_dir)}}
    }
    made = arm_recipe(recipe(arms=arms), "weak", 0)
    assert made.data.model.name == str(tiny_pipeline_dir)
    nowhere = ARMS | {"weak": {"title": "x", "changes": {"data.model": {"name": str(tmp_path / "nowhere")}}}}
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        open_run(arm_recipe(recipe(arms=nowhere), "weak", 0))
