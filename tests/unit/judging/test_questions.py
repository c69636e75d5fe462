import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import CaptionError, JudgeError
from selma_ray.judging.sources import grammar_questions
from selma_ray.judging.suites import open_suite


def line(prompt_id: Any = "a", prompt: Any = "a red cup", skill: Any = "common", questions: Any = None) -> Any:
    if questions is None:
        questions = [
            {"id": 1, "category": "whole", "question": "Is there a cup?", "parents": [0]},
            {"id": 2, "category": "color", "question": "Is the cup red?", "parents": [1]},
        ]
    return {"id": prompt_id, "skill": skill, "prompt": prompt, "questions": questions}


def write(path: Any, lines: Any) -> Any:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def question(number: Any, *parents: Any) -> Any:
    return {"id": number, "category": "whole", "question": "Is it?", "parents": list(parents)}


def test_reads_json_lines(tmp_path: Path) -> None:
    (prompt,) = open_suite(write(tmp_path / "suite.jsonl", [line()]))
    assert (prompt.id, prompt.skill, prompt.prompt) == ("a", "common", "a red cup")
    assert [(each.id, each.category, each.parents) for each in prompt.questions] == [
        (1, "whole", (0,)),
        (2, "color", (1,)),
    ]


def test_max_prompts_spreads_over_skills_and_keeps_the_order(tmp_path: Path) -> None:
    lines = [line(f"{skill}{number}", skill=skill) for skill in ("x", "y") for number in range(4)]
    suite = open_suite(write(tmp_path / "suite.jsonl", [*lines, line("z0", skill="z")]), max_prompts=5)
    assert [prompt.id for prompt in suite] == ["x0", "x1", "y0", "y1", "z0"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a"), line("a")], "1 faults .duplicated prompt id 1., first in line 2"),
        ([line(prompt=" ")], "empty prompt 1"),
        ([line(questions=[])], "no questions 1"),
        ([line(questions=[question(1), question(1)])], "duplicated question id 1"),
        ([line(questions=[question(1, 9)])], "missing parent, a has no question 9"),
        ([line(questions=[question(1, 2), question(2, 1)])], "cycle, a through questions"),
        ([line(questions=[question(1, 1)])], "cycle"),
        ([line(questions=[{**question(1), "question": " "}])], "empty question, a question 1"),
        ([line(questions=[{**question(1), "choices": ["red"], "answer": "blue"}])], "answer that is no choice 1"),
        ([line(questions=[]), line("b", prompt="")], "2 faults .no questions 1, empty prompt 1."),
        ([{"id": "a"}], "unreadable, KeyError 'questions'"),
        ([], "must hold at least one prompt"),
        ([line(prompt=None)], "line 1: unreadable, ValueError prompt must be a text, got null"),
        ([line(prompt=7)], "prompt must be a text, got 7"),
        ([line(prompt_id=None)], "id must be a text, got null"),
        ([line(skill=None)], "skill must be a text, got null"),
        ([line(questions=[{**question(1), "question": None}])], "question must be a text, got null"),
        ([line(questions=[question(1.5)])], "id must be a whole number, got 1.5"),
        ([line(questions=[question(True)])], "id must be a whole number, got true"),
        ([line(questions=[question(1, None)])], "parent must be a whole number, got null"),
        ([line(questions=[{**question(1), "parents": "1"}])], 'parents must be a list, got "1"'),
        ([line(questions=[{**question(1), "choices": "red", "answer": "red"}])], 'choices must be a list, got "red"'),
        ([line(questions=[{**question(1), "answer": "maybe"}])], "answer that is neither yes nor no, a question 1"),
        ([line(questions=[{**question(1), "weight": float("nan")}])], "unreadable, ValueError NaN is no JSON"),
        ([line(prompt="\ud83d")], "half of a surrogate pair"),
    ],
)
def test_faults_are_counted_and_the_first_is_named(tmp_path: Path, lines: Any, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        open_suite(write(tmp_path / "suite.jsonl", lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({}, "yes"),
        ({"answer": None}, "yes"),
        ({"answer": "no"}, "no"),
        ({"answer": "No."}, "no"),
        ({"answer": False}, "no"),
        ({"answer": True, "choices": None}, "yes"),
        ({"answer": "red", "choices": ["Red", "Blue"]}, "Red"),
        ({"answer": 0, "choices": [0, 1]}, "0"),
        ({"answer": "two", "choices": [1, 2.0]}, "2"),
        ({"answer": False, "choices": [True, False]}, "no"),
    ],
)
def test_gold_answers_as_files_have_them(tmp_path: Path, given: Any, answer: str) -> None:
    (prompt,) = open_suite(write(tmp_path / "suite.jsonl", [line(questions=[{**question(1), **given}])]))
    assert prompt.questions[0].answer == answer


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r", "\ufeff"])
def test_a_prompt_keeps_the_separators_that_end_no_line(tmp_path: Path, separator: str) -> None:
    prompt = f"a red{separator}cup"
    path = tmp_path / "suite.jsonl"
    path.write_text(f"\ufeff{json.dumps(line(prompt=prompt), ensure_ascii=False)}\n", encoding="utf-8", newline="")
    assert [each.prompt for each in open_suite(str(path))] == [prompt]


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"absent.jsonl cannot be read"):
        open_suite(str(tmp_path / "absent.jsonl"))


def test_miniature_suite_is_fixed_and_its_graphs_are_sound() -> None:
    suite = open_suite("miniature")
    assert len(suite) == 500
    assert len({prompt.id for prompt in suite}) == 500
    assert [prompt.skill for prompt in open_suite("miniature", 10)].count("counting") == 2
    for prompt in suite:
        ids = {each.id for each in prompt.questions} | {0}
        assert all(set(each.parents) <= ids - {each.id} for each in prompt.questions)


def test_questions_for_a_prompt_of_the_miniature_and_for_another() -> None:
    questions = grammar_questions("two red apples")
    assert {each.category for each in questions} == {"whole", "color", "count"}
    with pytest.raises(CaptionError):
        grammar_questions("the spirit of history")
