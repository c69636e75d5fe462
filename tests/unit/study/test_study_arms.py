import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.experts.config import ExpertsConfig, MixedConfig
from selma_ray.run.opening import Run, open_run
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.study.arms import arm_recipe, check_study, reuse, shared_values
from selma_ray.study.config import StudyConfig
from selma_ray.study.study import Study, load_study

ARMS = {
    "selma": {"title": "SELMA"},
    "factors": {"title": "mean of factors", "changes": {"merging.method": "average_factors"}},
    "longer": {"title": "longer", "changes": {"experts.steps": 7}},
    "guided": {"title": "images at guidance 1", "changes": {"images.sampling.guidance_scale": 1.0}},
    "all": {"title": "all", "changes": {"experts.mixed": {"ranks": [4]}}, "models": ["experts", "mixed", "merged"]},
    "mixed": {"title": "one LoRA", "changes": {"experts.mixed": {"ranks": [4]}}, "models": ["mixed"]},
    "moe": {"title": "MoE-LoRA", "changes": {"experts.moe": {"steps": 3}}, "models": ["moe"]},
}


MINIATURE_JUDGE = {"name": "miniature"}


@pytest.fixture
def study(tmp_path: Path, tiny_pipeline_dir: Path) -> Any:
    """Return a function that makes a study of a recipe whose models are in place."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")

    def make(**settings: Any) -> Study:
        whole = {
            "run_dir": str(tmp_path / "run"), "skills": ["miniature/common", "miniature/counting"],
            "model": {"name": str(tiny_pipeline_dir)}, "prompts": {"llm": {"name": str(tmp_path / "llm")}},
            "evaluation": {"suite": "miniature"},
        }  # fmt: skip
        config = validate(StudyConfig, {"recipe": "recipe.yaml", "arms": ARMS, **settings}, "test")
        return Study(config, validate(Recipe, whole, "test"))

    return make


@pytest.fixture
def opened(study: Any) -> Any:
    """Return a function that opens the run of an experiment at seed 0."""
    return lambda name, seed=0: open_run(arm_recipe(study(), name, seed))


def finish(run: Run, *stages: str) -> None:
    """Leave a run's folder as finished stages do, with files that say which run made them."""
    parts = {"generate": ("prompts", "images"), "train": ("cache", "experts")}
    for stage in stages:
        for part in parts[stage]:
            run.folder.write_bytes(run.folder.uri.encode(), part, "common", "file")
        run.folder.mark_done(stage, {"made_by": run.folder.uri})


def test_an_experiment_is_the_recipe_with_its_changes_and_the_study_s_seed(study: Any, tmp_path: Path) -> None:
    made = arm_recipe(study(), "factors", 2)
    assert (made.merging.method, made.seed) == ("average_factors", 2)
    assert made.run_dir == str(tmp_path / "run" / "study" / "factors" / "seed=2")
    assert made.experts == study().recipe.experts


def test_experiments_that_cannot_be_made_are_named_before_any_work(study: Any) -> None:
    with pytest.raises(ConfigError, match=r"arms\.new\.changes: experts\.step is not a known key; did you mean"):
        check_study(study(arms=ARMS | {"new": {"title": "x", "changes": {"experts.step": 1}}}))
    with pytest.raises(ConfigError, match=r"must not set seed"):
        check_study(study(arms=ARMS | {"new": {"title": "x", "changes": {"seed": 1}}}))
    with pytest.raises(ConfigError, match=r"reference must name one of"):
        check_study(study(reference="none"))


@pytest.mark.parametrize("name", ["miniature_study", "miniature_more"])
def test_the_miniature_s_experiments_can_be_made(name: str) -> None:
    study = load_study(f"jobs/recipes/{name}.yaml")
    check_study(study)
    assert study.config.reference == "selma"


def test_overrides_go_to_the_study_or_to_its_recipe(tmp_path: Path) -> None:
    overrides = ["study.seeds=[7]", f"run_dir={tmp_path}", "experts.steps=3"]
    study = load_study("jobs/recipes/miniature_more.yaml", overrides)
    assert (study.config.seeds, study.recipe.run_dir, study.recipe.experts.steps) == ((7,), str(tmp_path), 3)
    assert load_study("jobs/recipes/miniature_more.yaml").recipe.run_dir == "runs/miniature_more"


def test_a_recipe_is_no_study_and_a_study_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match=r"demo\.yaml names no experiments; name a study"):
        load_study("jobs/recipes/demo.yaml")
    with pytest.raises(ConfigError, match="is a study, not a recipe; run `selma study"):
        load_recipe("jobs/recipes/miniature_study.yaml")


def test_what_an_earlier_experiment_made_by_the_same_values_is_linked(opened: Any) -> None:
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    for part in ("prompts", "images", "cache", "experts"):
        assert run.folder.local_path(part, "common", "file").samefile(earlier.folder.local_path(part, "common", "file"))
    assert run.folder.done("train") == {"made_by": earlier.folder.uri}


@pytest.mark.parametrize(("name", "shared"), [("longer", {"prompts", "images", "cache"}), ("guided", {"prompts"})])
def test_what_other_values_would_change_is_made_again(opened: Any, name: str, shared: Any) -> None:
    earlier, run = opened("selma"), opened(name)
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    there = {part for part in ("prompts", "images", "cache", "experts") if run.folder.local_path(part).exists()}
    assert there == shared
    assert (run.folder.done("generate") is not None) == ("images" in shared)


@pytest.mark.parametrize(
    ("judged", "shared"),
    [
        ({}, {"prompts", "images", "cache", "experts"}),
        ({"experts.nft": {"judge": MINIATURE_JUDGE}}, {"prompts", "images", "cache"}),
        ({"experts.selection": {"every_steps": 10}}, {"prompts", "images", "cache"}),
        ({"images.per_prompt": 2, "images.selection": {"judge": MINIATURE_JUDGE}}, {"prompts"}),
    ],
)
def test_other_questions_make_anew_what_a_judge_decides(study: Any, judged: dict[str, Any], shared: set[str]) -> None:
    arms = {
        "selma": {"title": "SELMA", "changes": judged},
        "exact": {"title": "exact counts", "changes": {**judged, "questions.exact_counts": True}},
    }
    one, other = (arm_recipe(study(arms=arms), name, 0) for name in arms)
    alike = {
        part for part in ("prompts", "images", "cache", "experts")
        if shared_values(one, part) == shared_values(other, part)
    }  # fmt: skip
    assert alike == shared


def test_other_seeds_and_unfinished_runs_are_not_reused(opened: Any) -> None:
    other_seed, unfinished, run = opened("selma", 1), opened("selma"), opened("factors")
    finish(other_seed, "generate", "train")
    unfinished.folder.write_bytes(b"", "prompts", "common", "file")
    reuse(run, [other_seed, unfinished])
    assert not run.folder.local_path("prompts").exists()


def test_own_work_stays_when_an_experiment_goes_on(opened: Any) -> None:
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate")
    finish(run, "generate")
    reuse(run, [earlier])
    assert json.loads(json.dumps(run.folder.done("generate"))) == {"made_by": run.folder.uri}


def test_baselines_are_made_only_where_they_are_scored(study: Any) -> None:
    experts = ExpertsConfig(mixed=MixedConfig(ranks=(4,)))
    with_mixed = Study(study().config, study().recipe.model_copy(update={"experts": experts}))
    assert arm_recipe(with_mixed, "selma", 0).experts.mixed is None
    assert arm_recipe(with_mixed, "mixed", 0).experts.mixed is not None
    with pytest.raises(ConfigError, match=r"arms\.new\.models names moe, which experts\.moe does not ask for"):
        check_study(study(arms=ARMS | {"new": {"title": "x", "models": ["moe"]}}))


@pytest.mark.parametrize(
    ("source", "name", "finished"),
    [("all", "selma", True), ("all", "mixed", True), ("selma", "moe", False), ("selma", "all", False)],
)
def test_experts_are_shared_and_baselines_that_are_not_there_are_fitted(
    opened: Any, source: str, name: str, finished: bool
) -> None:
    earlier, run = opened(source), opened(name)
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    assert run.folder.local_path("experts", "common", "file").samefile(
        earlier.folder.local_path("experts", "common", "file")
    )
    assert (run.folder.done("train") is not None) == finished
    assert run.folder.done("generate") == {"made_by": earlier.folder.uri}


def test_encoded_examples_are_shared_where_the_images_are(opened: Any) -> None:
    earlier, run = opened("selma"), opened("longer")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    assert run.folder.exists("cache")
    assert not run.folder.exists("experts")


def test_an_experiment_that_was_stopped_while_it_took_over_goes_on(opened: Any) -> None:
    earlier, run = opened("selma"), opened("factors")
    finish(earlier, "generate", "train")
    reuse(run, [earlier])
    run.folder.delete("experts")
    run.folder.delete("done", "train.json")
    reuse(run, [earlier])
    assert run.folder.done("train") == {"made_by": earlier.folder.uri}


def test_images_may_come_from_another_model(study: Any, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    arms = ARMS | {
        "weak": {"title": "images of a weaker model", "changes": {"data.model.name": str(tiny_pipeline_dir)}}
    }
    made = arm_recipe(study(arms=arms), "weak", 0)
    assert made.data.model.name == str(tiny_pipeline_dir)
    nowhere = ARMS | {"weak": {"title": "x", "changes": {"data.model": {"name": str(tmp_path / "nowhere")}}}}
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        open_run(arm_recipe(study(arms=nowhere), "weak", 0))


def test_where_work_is_placed_does_not_keep_experiments_from_sharing_it(study: Any) -> None:
    recipe = study().recipe
    elsewhere = recipe.model_copy(update={"images": recipe.images.model_copy(update={"num_cpus": 4.0})})
    assert shared_values(recipe, "experts") == shared_values(elsewhere, "experts")
    more_often = recipe.experts.model_copy(update={"checkpoint_every_steps": 7})
    assert shared_values(recipe, "experts") == shared_values(
        recipe.model_copy(update={"experts": more_often}), "experts"
    )
