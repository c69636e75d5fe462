from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from selma_ray.config import validate
from selma_ray.errors import JudgeError
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.judging.suites import open_suite
from selma_ray.models.config import ModelConfig
from selma_ray.records import ANSWER_SCHEMA
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder
from selma_ray.study.config import StudyConfig
from selma_ray.study.run import study_steps
from selma_ray.study.study import Study
from selma_ray.study.tables import StudyScores, write_tables

CONFIG = EvaluationConfig(bootstrap_resamples=200)
SUITE = open_suite("miniature", 10)
MODELS = ("base", "selma.merged", "selma.common")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a study of two seeds at two guidance scales, nothing scored yet."""
    config = {
        "recipe": "recipe.yaml", "seeds": [0, 1], "guidance_scales": [1.0, 2.0],
        "arms": {"selma": {"title": "SELMA", "models": ["experts", "merged"]}},
    }  # fmt: skip
    recipe = {"run_dir": str(tmp_path), "skills": ["miniature/common"]}
    return Study(validate(StudyConfig, config, "test"), validate(Recipe, recipe, "test"))


def score(study: Study, seed: int, guidance_scale: float, right: dict[str, int]) -> None:
    """Write answers: the first `right[model]` prompts of each model have every answer yes, the others none."""
    answer(study, seed, guidance_scale, {model: {prompt.id for prompt in SUITE[: right[model]]} for model in MODELS})


def answer(study: Study, seed: int, guidance_scale: float, right: Mapping[str, Collection[str]]) -> None:
    """Write answers: the prompts `right[model]` of each model have every answer yes, the others none."""
    folder = study.scores(seed, guidance_scale)
    for model in right:
        rows = [
            {
                "model": model, "skill": prompt.skill, "prompt_id": prompt.id, "prompt": prompt.prompt, "seed": 100 * seed + row,
                "question_id": each.id, "category": each.category, "question": each.question, "parents": list(each.parents),
                "answer": "yes" if prompt.id in right[model] else "no", "p_yes": 0.5, "reason": None, "judge": "judge", "gold": None,
            }
            for row, prompt in enumerate(SUITE) for each in prompt.questions
        ]  # fmt: skip
        folder.write_table(pa.Table.from_pylist(rows, ANSWER_SCHEMA), "evaluation", model, "answers", "0.parquet")
    folder.mark_done("scores", {"models": list(right)})


def test_scores_of_all_seeds_are_pooled_and_compared_at_the_same_and_at_each_best_guidance(study: Study) -> None:
    for seed, gained in ((0, 7), (1, 9)):
        score(study, seed, 1.0, {"base": 5, "selma.merged": gained, "selma.common": 5})
        score(study, seed, 2.0, {"base": 6, "selma.merged": 6, "selma.common": 4})
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    found = study.folder.read_json("study", "study.json")
    at_one, at_two = found["guidance_scales"]["1"], found["guidance_scales"]["2"]
    assert found["seeds"] == [0, 1]
    assert at_one["models"]["base"]["dsg"] == pytest.approx(0.5)
    assert at_one["models"]["selma.merged"]["dsg"] == pytest.approx(0.8)
    assert at_one["models"]["selma.merged"]["seeds"]["means"] == pytest.approx([0.7, 0.9])
    assert at_one["differences"]["selma.merged"]["mean"] == pytest.approx(0.3)
    assert at_two["differences"]["selma.merged"]["mean"] == pytest.approx(0.0)
    assert found["best"]["scales"] == {"base": 2.0, "selma.merged": 1.0, "selma.common": 1.0}
    assert found["best"]["differences"]["selma.merged"]["mean"] == pytest.approx(0.2)
    assert found["against_reference"]["1"]["selma.common"]["mean"] == pytest.approx(-0.3)


def test_tables_name_every_model_with_its_interval(study: Study) -> None:
    score(study, 0, 1.0, {"base": 5, "selma.merged": 7, "selma.common": 5})
    text = RunFolder(study.folder.uri)
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    lines = text.read_bytes("study", "tables.md").decode().splitlines()
    assert any(line.startswith("| SELMA | 70.0 [") for line in lines)
    assert any(line.startswith("| SELMA: common | 50.0 [") for line in lines)
    assert any(line.startswith("| SELMA | +20.0 [") and line.endswith("(at 1, base at 1) |") for line in lines)


def test_scores_on_another_suite_stand_beside_those_of_the_recipe(study: Study) -> None:
    other = replace(study, config=study.config.model_copy(update={"suite": "/data/mine.jsonl"}))
    score(study, 0, 1.0, {"base": 5, "selma.merged": 7, "selma.common": 5})
    assert not StudyScores.read(other, SUITE, CONFIG).pooled
    score(other, 0, 1.0, {"base": 5, "selma.merged": 9, "selma.common": 5})
    for each, figure, place in ((study, "70.0", "tables.md"), (other, "90.0", "suite=mine/tables.md")):
        write_tables(each, StudyScores.read(each, SUITE, CONFIG))
        assert f"| SELMA | {figure} [" in study.folder.read_bytes("study", place).decode()


def test_a_suite_that_cannot_be_read_is_told_before_any_experiment(study: Study, tiny_pipeline_dir: Path) -> None:
    recipe = study.recipe.model_copy(update={"model": ModelConfig(name=str(tiny_pipeline_dir))})
    config = study.config.model_copy(update={"suite": "nowhere.jsonl"})
    with pytest.raises(JudgeError, match=r"nowhere\.jsonl"):
        study_steps(Study(config, recipe))


def test_a_figure_of_fewer_seeds_than_others_says_so(study: Study) -> None:
    right = {"base": 5, "selma.merged": 7, "selma.common": 5}
    for seed, guidance_scale in ((0, 1.0), (1, 1.0), (0, 2.0)):
        score(study, seed, guidance_scale, right)
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    lines = study.folder.read_bytes("study", "tables.md").decode().splitlines()
    (base,) = (line for line in lines if line.startswith("| base |"))
    at_one, at_two = base.strip("| ").split(" | ")[1:]
    assert "seeds)" not in at_one
    assert at_two.endswith("(1 of 2 seeds)")


def test_unfinished_scores_are_left_out(study: Study) -> None:
    score(study, 0, 1.0, {"base": 5, "selma.merged": 7, "selma.common": 5})
    study.folder.delete("study", "scores", "seed=0", "guidance=1", "done")
    scores = StudyScores.read(study, SUITE, CONFIG)
    assert scores.pooled == {}
    assert scores.seeds == ()


def test_models_of_an_experiment_that_the_recipe_no_longer_names_are_left_out(study: Study) -> None:
    score(study, 0, 1.0, {"base": 5, "selma.merged": 7, "selma.common": 5})
    folder = RunFolder(study.place("scores", "seed=0", "guidance=1"))
    folder.mark_done("scores", {"models": [*MODELS, "gone.merged"]})
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    assert "gone" not in study.folder.read_bytes("study", "study.json").decode()


def test_models_of_all_skills_are_held_against_each_expert_on_its_own_skill(study: Study) -> None:
    skills = sorted({prompt.skill for prompt in SUITE})
    of_skill = {skill: [prompt.id for prompt in SUITE if prompt.skill == skill] for skill in skills}
    # Every expert is right on one of two captions of its skill and on all others; the merged model on those of the first skill.
    every = [prompt.id for prompt in SUITE]
    experts = {f"selma.{skill}": [each for each in every if each != of_skill[skill][0]] for skill in skills}
    answer(study, 0, 1.0, {"base": [], "selma.merged": of_skill[skills[0]], **experts})
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    text = RunFolder(study.folder.uri).read_bytes("study", "tables.md").decode()
    table = text.partition("“SELMA”, each expert on the captions of its own skill:")[2]
    assert "| SELMA | -30.0 [" in table
    assert "| SELMA: common |" not in table


def test_without_an_expert_for_every_skill_of_the_suite_nothing_is_held_against_them(study: Study) -> None:
    score(study, 0, 1.0, {"base": 5, "selma.merged": 7, "selma.common": 5})
    write_tables(study, StudyScores.read(study, SUITE, CONFIG))
    assert b"of its own skill" not in RunFolder(study.folder.uri).read_bytes("study", "tables.md")
