from typing import Any

from selma_ray.config import validate
from selma_ray.run.recipe import Recipe
from selma_ray.study.config import StudyConfig
from selma_ray.study.plan import plan_study
from selma_ray.study.study import Study

CHOICE = {"images.per_prompt": 4, "images.selection": {"judge": "miniature"}}
ARMS = {
    "selma": {"title": "SELMA", "models": ["experts", "mixed", "merged"]},
    "factors": {"title": "factors", "changes": {"merging.method": "average_factors"}},
    "drawn": {"title": "drawn", "changes": {"data.prompts": "ground_truth", "data.images": "ground_truth"}},
    "chosen": {"title": "chosen", "changes": CHOICE},
    "dpo": {"title": "DPO", "changes": CHOICE | {"experts.dpo": {}}},
    "moe": {"title": "MoE", "models": ["moe"], "changes": {"experts.moe": {"steps": 7}}},
}


def study(**changes: Any) -> Study:
    whole = {
        "run_dir": "runs/x", "skills": ["miniature/common", "miniature/counting"],
        "prompts": {"per_skill": 40, "dev_fraction": 0.05}, "experts": {"steps": 100, "mixed": {"ranks": [4, 8], "steps": 50}},
        "evaluation": {"suite": "miniature"},
    }  # fmt: skip
    config = {"recipe": "recipe.yaml", "seeds": [0, 1, 2], "guidance_scales": [1, 2], "max_prompts": 10, "arms": ARMS}
    return Study(validate(StudyConfig, config, "test"), validate(Recipe, whole | changes, "test"))


def test_what_experiments_share_is_counted_once() -> None:
    plan = plan_study(study())
    assert plan.runs == 3 * 6
    assert plan.prompts == 3 * 2 * 40, "all experiments but the drawn one have the same prompts"
    assert sorted(count for count, _ in plan.images) == [3 * 2 * 38, 3 * 2 * 38 * 4]
    assert len(plan.experts) == 3 * (2 * 4 + 2 + 1), (
        "experts of selma, drawn, chosen and dpo; two mixed LoRAs; a mixture"
    )
    assert sum(each.steps for each in plan.experts) == 3 * (2 * 4 * 100 + 2 * 50 + 7)
    models = 1 + (2 + 2 + 1) + 1 + 1 + 1 + 1 + 1
    assert [(count, sampling.guidance_scale) for count, sampling in plan.scored] == [
        (3 * models * 10, 1),
        (3 * models * 10, 2),
    ]


def test_rounds_and_students_are_counted() -> None:
    made = study(prompts={"per_skill": 40, "dev_fraction": 0.05})
    arms = {
        "once": {"title": "once"},
        "rounds": {"title": "rounds", "changes": {"rounds": 3}},
        "student": {"title": "student", "changes": {"merging.method": "distil", "merging.distil.steps": 7}},
    }
    config = made.config.model_dump(mode="json") | {"arms": arms, "reference": "once"}
    plan = plan_study(Study(validate(StudyConfig, config, "test"), made.recipe))
    assert [each.steps for each in plan.distilled] == [7] * 3
    assert len(plan.experts) % (3 * 2) == 0
    assert len(plan.experts) >= 3 * 2 * 3, "the first round's, and those of two more"
    assert sum(count for count, _ in plan.images) >= 3 * 2 * 38 * 3


def test_a_suite_that_cannot_be_read_is_left_open() -> None:
    assert plan_study(study(evaluation={"suite": "nowhere.jsonl"})).scored is None


def test_the_plan_counts_the_training_images_that_a_run_renders() -> None:
    counts = [count for count, _ in plan_study(study(prompts={"per_skill": 10, "dev_fraction": 0.05})).images]
    assert min(counts) == 3 * 2 * 9, "of ten prompts one is held out, though a twentieth rounds to none"
