"""Answers of a language model read tolerantly: what cannot be used is counted by what is wrong with it, never raised."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selma_ray.judging.questions import Question
from selma_ray.judging.writing.requests import TIFA_TYPES

__all__ = [
    "Parsed",
    "parse_json",
    "parse_lines",
    "parse_parents",
    "parse_tifa_json",
    "parse_tifa_text",
    "tuple_category",
]

_LINE = re.compile(r"\s*(?:[-*•]\s*)?(\d{1,4})\s*(?:[.):]\s*\|?|\|)\s*(.*\S)?\s*")
_TUPLE = re.compile(r"([a-z]+) - (.*?)\s*\((.*)\)\s*", re.DOTALL)
_ROOT_WORDS = ("", "-", "none", "null", "n/a", "root", "[]")
_ABOUT = re.compile(r"\s*about\s+(.+?)\s*\(([a-z ]+)\)\s*:?\s*", re.IGNORECASE)
_FIELD = re.compile(r"\s*(q|question|choices|options|a|answer)\s*:\s*(.*\S)?\s*", re.IGNORECASE)
_ANIMAL_OR_HUMAN = "animal/human"


@dataclass(frozen=True)
class Parsed:
    """Texts by id, in order, and counts of what was left out."""

    texts: dict[int, str]
    ignored: Counter[str] = field(default_factory=Counter)


def parse_lines(answer: str) -> Parsed:
    """Read lines such as `1 | a tuple`, `1. text`, `2) text`, `3: text`; a `|` in the text stays.

    Reads from the first "output:" to the next "input:", as a model that only completes text goes on with another example.
    Lines that do not match and empty texts are counted; of lines with one id the first counts.
    """
    body = answer.partition("output:")[2] if "output:" in answer else answer
    texts: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for line in body.partition("input:")[0].splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            ignored["line without a number"] += bool(line.strip())
        elif match[2] is None:
            ignored["empty text"] += 1
        elif int(match[1]) in texts:
            ignored["duplicated id"] += 1
        else:
            texts[int(match[1])] = match[2]
    return Parsed(texts, +ignored)


def parse_json(answer: str) -> Parsed:
    """Read a JSON list of texts, numbered from 1, or an object from ids to texts or lists of ids."""
    value = _json_value(answer)
    if isinstance(value, list):
        value = {str(number): text for number, text in enumerate(value, start=1)}
    if not isinstance(value, dict):
        return Parsed({}, Counter({"no JSON": 1}))
    if not value:
        return Parsed({}, Counter({"no items": 1}))
    texts: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for key, each in value.items():
        text = ",".join(map(str, each)) or "0" if isinstance(each, list) else str(each).strip()
        if not str(key).isdecimal():
            ignored["id that is no number"] += 1
        elif not text or each is None:
            ignored["empty text"] += 1
        else:
            texts[int(key)] = " ".join(text.split())
    return Parsed(texts, ignored)


def parse_parents(texts: Mapping[int, str], ids: Sequence[int]) -> tuple[dict[int, tuple[int, ...]], Counter[str]]:
    """Return the parents of each id, 0 for the root, and counts of what was dropped: unknown, self and cyclic parents, words.

    An edge that would close a cycle is dropped where it is met, in the order of the ids.
    """
    dropped: Counter[str] = Counter()
    parents: dict[int, tuple[int, ...]] = {}
    for number in ids:
        kept: list[int] = []
        for part in (part.strip().lower() for part in texts.get(number, "").split(",")):
            if part in _ROOT_WORDS or part == "0":
                continue
            if not part.isdecimal():
                dropped["parent that is no number"] += 1
            elif int(part) == number:
                dropped["self parent"] += 1
            elif int(part) not in ids:
                dropped["unknown parent"] += 1
            elif _reaches(int(part), number, parents):
                dropped["cyclic parent"] += 1
            elif int(part) not in kept:
                kept.append(int(part))
        parents[number] = tuple(kept) or (0,)
    return parents, dropped


def tuple_category(text: str) -> str:
    """Return the detailed category of a tuple such as `attribute - color (car, red)`, the broad one where it has none."""
    match = _TUPLE.fullmatch(text.strip())
    if match is None:
        return "other"
    return match[2] or match[1]


def parse_tifa_text(answer: str) -> tuple[list[Question], Counter[str]]:
    """Read TIFA's blocks of "About", "Q", "Choices" and "A" lines; an incomplete or senseless question is counted."""
    element = kind = None
    open_question: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    ignored: Counter[str] = Counter()
    # A model that only completes text goes on with another description.
    for line in re.split(r"^\s*description\s*:", answer, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[
        0
    ].splitlines():
        if about := _ABOUT.fullmatch(line):
            element, kind = about[1], about[2].strip().lower()
        elif match := _FIELD.fullmatch(line):
            name, text = match[1][0].lower(), match[2] or ""
            if name == "q":
                ignored["question without an answer"] += bool(open_question)
                open_question = {"element": element, "type": kind, "question": text}
            elif name in ("c", "o"):
                open_question["choices"] = [choice.strip() for choice in text.split(",") if choice.strip()]
            else:
                found.append({**open_question, "answer": text})
                open_question = {}
    ignored["question without an answer"] += bool(open_question)
    return _tifa_questions(found, ignored)


def parse_tifa_json(answer: str) -> tuple[list[Question], Counter[str]]:
    """Read a JSON list of questions; an incomplete or senseless question is counted."""
    value = _json_value(answer)
    if not isinstance(value, list):
        return [], Counter({"no JSON": 1})
    return _tifa_questions(value, Counter())


def _tifa_questions(found: Sequence[Any], ignored: Counter[str]) -> tuple[list[Question], Counter[str]]:
    questions: list[Question] = []
    seen: set[str] = set()
    for each in found:
        fault, kind, text, choices, answer = _checked(each, seen)
        if fault:
            ignored[fault] += 1
            continue
        seen.add(text)
        category = _ANIMAL_OR_HUMAN if kind in ("animal", "human") else kind
        questions.append(Question(len(questions) + 1, category, text, (), choices, answer))
    return questions, +ignored


def _checked(each: Any, seen: set[str]) -> tuple[str | None, str, str, tuple[str, ...], str]:
    if not isinstance(each, dict):
        return "question that is no object", "", "", (), ""
    kind, text, answer = (str(each.get(key) or "").strip() for key in ("type", "question", "answer"))
    listed = each.get("choices")
    choices = tuple(dict.fromkeys(str(choice).strip() for choice in listed)) if isinstance(listed, list) else ()
    if kind not in TIFA_TYPES:
        fault = "unknown type"
    elif not text:
        fault = "empty question"
    elif text in seen:
        fault = "duplicated question"
    elif len(choices) < 2:
        fault = "fewer than two choices"
    elif answer not in choices:
        fault = "answer that is no choice"
    else:
        fault = None
    return fault, kind, text, choices, answer


def _json_value(answer: str) -> Any:
    """Return the first JSON list or object in a text; None where there is none that is whole."""
    start = min((index for bracket in "[{" if (index := answer.find(bracket)) >= 0), default=None)
    if start is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(answer[start:])[0]
    except (ValueError, RecursionError):
        return None


def _reaches(start: int, goal: int, parents: Mapping[int, Sequence[int]]) -> bool:
    """Return whether `goal` is `start` or one of its ancestors."""
    waiting, seen = [start], set()
    while waiting:
        number = waiting.pop()
        if number == goal:
            return True
        if number not in seen:
            seen.add(number)
            waiting += [parent for parent in parents.get(number, ()) if parent]
    return False
