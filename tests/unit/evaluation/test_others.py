from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError, JudgeError
from selma_ray.evaluation.config import EvaluationConfig, OtherResult
from selma_ray.evaluation.others import read_others, refuse_other_judges
from selma_ray.judging.suites import open_suite
from tests.unit.evaluation.finished_runs import JUDGE, write_finished_run

SUITE = open_suite("miniature", 5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_finished_run(tmp_path_factory.mktemp("other"), max_prompts=5)


def comparing(other: Any, model: str = "merged", **changes: Any) -> EvaluationConfig:
    return EvaluationConfig(compare_with={"ties": OtherResult(run_dir=other.uri, model=model)}, **changes)


def test_answers_of_another_run_are_read_with_their_judge(other: Any) -> None:
    results = read_others(comparing(other), SUITE, taken=["base", "merged"])
    assert len(results["ties"].answers) == sum(len(prompt.questions) for prompt in SUITE)
    assert refuse_other_judges(JUDGE, results, comparing(other)) == {"ties": JUDGE}


def test_results_of_another_judge_are_refused_unless_told(other: Any) -> None:
    results = read_others(comparing(other), SUITE, taken=[])
    with pytest.raises(JudgeError, match=r"evaluation\.allow_other_judge=true"):
        refuse_other_judges("blip@1", results, comparing(other))
    assert refuse_other_judges("blip@1", results, comparing(other, allow_other_judge=True)) == {"ties": JUDGE}


@pytest.mark.parametrize(
    ("changes", "taken", "expected"),
    [
        ({"model": "nobody"}, [], "model must be one of base"),
        ({}, ["ties"], "is the name of a model of this run"),
    ],
)
def test_names_are_checked(other: Any, changes: Any, taken: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_others(comparing(other, **changes), SUITE, taken)


def test_a_folder_without_a_finished_evaluation_is_named(tmp_path: Path) -> None:
    config = EvaluationConfig(compare_with={"ties": OtherResult(run_dir=str(tmp_path))})
    with pytest.raises(ConfigError, match="holds no finished evaluation"):
        read_others(config, SUITE, [])


def test_other_prompts_and_other_questions_are_refused(other: Any) -> None:
    with pytest.raises(JudgeError, match="shares no prompt"):
        read_others(comparing(other), open_suite("miniature")[-1:], [])
    fewer = [type(prompt)(prompt.id, prompt.skill, prompt.prompt, prompt.questions[:1]) for prompt in SUITE]
    with pytest.raises(JudgeError, match="asked other questions"):
        read_others(comparing(other), fewer, [])
