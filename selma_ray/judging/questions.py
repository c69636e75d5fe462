"""Prompts with the questions that an image of them must answer, and the files that hold them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import zip_longest
from pathlib import Path
from typing import Any

from selma_ray.errors import JudgeError
from selma_ray.json_lines import numbered_lines, parse_json
from selma_ray.judging.answers import choice_of, text_of
from selma_ray.judging.judges.interface import YES_OR_NO

__all__ = [
    "PromptWithQuestions",
    "Question",
    "check_questions",
    "read_suite",
    "spread_over_skills",
]


@dataclass(frozen=True)
class Question:
    """A question about an image; `parents` are the questions it depends on, 0 stands for the root.

    It is a yes/no question unless it has `choices`. The gold `answer` is one of them, or yes or no, and is spelled as they are
    however it was given.
    """

    id: int
    category: str
    question: str
    parents: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str = "yes"

    def __post_init__(self) -> None:
        gold = choice_of(self.answer, self.choices or YES_OR_NO)
        object.__setattr__(self, "answer", self.answer if gold is None else gold)


@dataclass(frozen=True)
class PromptWithQuestions:
    """A prompt to render and the questions its image is asked."""

    id: str
    skill: str
    prompt: str
    questions: tuple[Question, ...]


def read_suite(path: Path) -> list[PromptWithQuestions]:
    """Read a suite from a JSON Lines file.

    A line is {"id", "skill", "prompt", "questions": [{"id", "category", "question", "parents"}]}; a multiple-choice question has
    "choices" and its gold "answer" as well. Raises JudgeError, with counts, for duplicated ids, empty prompts and questions, prompts
    without questions, missing parents, cycles and answers that are no choice.
    """
    try:
        lines = numbered_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(
            f"evaluation.suite {path} cannot be read ({error}); name miniature or a JSON Lines file"
        ) from None
    suite: list[PromptWithQuestions] = []
    faults: list[tuple[int, str, str]] = []
    seen: set[str] = set()
    for number, line in lines:
        try:
            prompt = _prompt_of(parse_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            faults.append((number, "unreadable", f"{type(error).__name__} {error}"))
            continue
        faults += [(number, kind, detail) for kind, detail in _faults_of(prompt, seen)]
        seen.add(prompt.id)
        suite.append(prompt)
    if faults:
        number, kind, detail = faults[0]
        counts = ", ".join(f"{kind} {count}" for kind, count in Counter(kind for _, kind, _ in faults).items())
        raise JudgeError(
            f"evaluation.suite {path} has {len(faults)} faults ({counts}), first in line {number}: {kind}, {detail}; fix them"
        )
    if not suite:
        raise JudgeError(f"evaluation.suite {path} must hold at least one prompt, holds none; add lines to it")
    return suite


def check_questions(questions: Sequence[Question]) -> None:
    """Raise JudgeError where ids are duplicated, a parent is missing or questions depend on one another in a circle."""
    for kind, detail in _faults_of(PromptWithQuestions("the prompt", "", "prompt", tuple(questions)), set()):
        raise JudgeError(f"questions: {kind}, {detail}")


def spread_over_skills(suite: Sequence[PromptWithQuestions], count: int) -> list[PromptWithQuestions]:
    """Return `count` prompts, drawn from the skills in turn, in the suite's order."""
    by_skill: dict[str, list[PromptWithQuestions]] = {}
    for prompt in suite:
        by_skill.setdefault(prompt.skill, []).append(prompt)
    in_turn = [prompt for turn in zip_longest(*by_skill.values()) for prompt in turn if prompt is not None]
    chosen = {prompt.id for prompt in in_turn[:count]}
    return [prompt for prompt in suite if prompt.id in chosen]


def _prompt_of(row: Mapping[str, Any]) -> PromptWithQuestions:
    questions = tuple(
        Question(
            _integer(each, "id"),
            _text(each, "category"),
            _text(each, "question"),
            tuple(_integer({"parent": parent}, "parent") for parent in _list(each, "parents")),
            tuple(map(text_of, _list(each, "choices"))),
            text_of(each.get("answer")) or "yes",
        )
        for each in row["questions"]
    )
    prompt_id = row["id"] if isinstance(row["id"], int) and not isinstance(row["id"], bool) else _text(row, "id")
    return PromptWithQuestions(str(prompt_id), _text(row, "skill"), _text(row, "prompt"), questions)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be a text, got {json.dumps(row[key])}")
    return row[key]


def _integer(row: Mapping[str, Any], key: str) -> int:
    value = text_of(row[key])
    if isinstance(row[key], bool) or not value.isdecimal():
        raise ValueError(f"{key} must be a whole number, got {json.dumps(row[key])}")
    return int(value)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{key} must be a list, got {json.dumps(value)}")
    return value or []


def _faults_of(prompt: PromptWithQuestions, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each kind of fault with a detail."""
    ids = [question.id for question in prompt.questions]
    if prompt.id in seen:
        yield "duplicated prompt id", prompt.id
    if not prompt.prompt.strip():
        yield "empty prompt", prompt.id
    if not ids:
        yield "no questions", prompt.id
    if len(set(ids)) != len(ids):
        yield "duplicated question id", prompt.id
    for question in prompt.questions:
        if not question.question.strip():
            yield "empty question", f"{prompt.id} question {question.id}"
        if question.answer not in (question.choices or YES_OR_NO):
            kind = "answer that is no choice" if question.choices else "answer that is neither yes nor no"
            yield kind, f"{prompt.id} question {question.id}"
    graph = {question.id: {parent for parent in question.parents if parent != 0} for question in prompt.questions}
    missing = {parent for parents in graph.values() for parent in parents} - set(ids)
    if missing:
        yield "missing parent", f"{prompt.id} has no question {min(missing)}"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "cycle", f"{prompt.id} through questions {error.args[1]}"
