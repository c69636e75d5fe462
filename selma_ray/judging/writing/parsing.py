"""Answers of a language model read tolerantly: what cannot be used is counted by what is wrong with it, never raised."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from selma_ray.json_lines import refuse_constant
from selma_ray.judging.answers import choice_of, text_of
from selma_ray.judging.questions import Question
from selma_ray.judging.writing.requests import TIFA_TYPES, Call
from selma_ray.models.thinking import split_thoughts

__all__ = [
    "Parsed",
    "parse_json",
    "parse_lines",
    "parse_parents",
    "parse_tifa_json",
    "parse_tifa_text",
    "tuple_category",
]

_LINE = re.compile(r"\s*(?:[-*•]\s*)?(\d{1,4})\s*(?:[.):、．）：]\s*\|?|\|)\s*(.*\S)?\s*")
_TUPLE = re.compile(r"([a-z]+) - (.*?)\s*\((.*)\)\s*", re.DOTALL)
_ROOT_WORDS = ("", "-", "none", "null", "n/a", "root")
_ABOUT = re.compile(r"\s*about\s+(.+?)\s*\(([a-z ]+)\)\s*:?\s*", re.IGNORECASE)
_FIELD = re.compile(r"\s*\**(q|question|choices|options|a|answer)\**\s*:\**\s*(.*\S)?\s*", re.IGNORECASE)
_ANIMAL_OR_HUMAN = "animal/human"
_ID_KEYS = ("id", "number", "index")
# Where an object of an answer has the text that a call asks for; the first that is there.
_TEXT_KEYS: Mapping[Call, Sequence[str]] = {
    "tuple": ("tuple", "text"),
    "question": ("question", "text"),
    "dependency": ("dependencies", "dependency", "parents", "parent"),
}
_TRIED_BRACKETS = 16  # tried as the beginning of JSON, at the most


@dataclass(frozen=True)
class Parsed:
    """Texts by id, in order, and counts of what was left out."""

    texts: dict[int, str]
    ignored: Counter[str] = field(default_factory=Counter)


def parse_lines(answer: str) -> Parsed:
    """Read lines such as `1 | a tuple`, `1. text`, `2) text`, `3: text`; a `|` in the text stays.

    Reads from the first "output:" to the next "input:", as a model that only completes text goes on with another example.
    What the model thought before is left out. Lines that do not match and empty texts are counted; of lines with one id the first
    counts.
    """
    said = split_thoughts(answer)[1]
    body = said.partition("output:")[2] if "output:" in said else said
    texts: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for line in body.partition("input:")[0].split("\n"):
        match = _LINE.fullmatch(line)
        if match is None:
            ignored["line without a number"] += bool(line.strip())
        elif match[2] is None:
            ignored["empty text"] += 1
        elif int(match[1]) in texts:
            ignored["duplicated id"] += 1
        else:
            texts[int(match[1])] = " ".join(match[2].split())
    return Parsed(texts, +ignored)


def parse_json(answer: str, call: Call = "tuple") -> Parsed:
    """Read a JSON list of texts, numbered from 1, or an object from ids to texts or lists of ids; a text may stand in an object.

    Such an object has the text under the name of what the `call` asks for, or alone beside an id. Of items with one id the first
    counts.
    """
    value = _unwrapped(_json_value(answer))
    if not isinstance(value, (list, dict)):
        return Parsed({}, Counter({"no JSON": 1}))
    if not value:
        return Parsed({}, Counter({"no items": 1}))
    texts: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for key, each in value.items() if isinstance(value, dict) else enumerate(value, start=1):
        number, text = _numbered_text(key, each, call)
        if number is None:
            ignored["id that is no number"] += 1
        elif not text:
            ignored["empty text"] += 1
        elif number in texts:
            ignored["duplicated id"] += 1
        else:
            texts[number] = text
    return Parsed(texts, ignored)


def parse_parents(texts: Mapping[int, str], ids: Sequence[int]) -> tuple[dict[int, tuple[int, ...]], Counter[str]]:
    """Return the parents of each id, 0 for the root, and counts of what was dropped: unknown, self and cyclic parents, words.

    An edge that would close a cycle is dropped where it is met, in the order of the ids.
    """
    dropped: Counter[str] = Counter()
    parents: dict[int, tuple[int, ...]] = {}
    for number in ids:
        kept: list[int] = []
        for part in (part.strip(" .[]()").lower() for part in re.split("[,、，]", texts.get(number, ""))):
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
    said = split_thoughts(answer)[1]
    for line in re.split(r"^\s*description\s*:", said, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0].split("\n"):
        if about := _ABOUT.fullmatch(line):
            element, kind = about[1], about[2].strip().lower()
        elif match := _FIELD.fullmatch(line):
            name, text = match[1][0].lower(), match[2] or ""
            if name == "q":
                ignored["question without an answer"] += bool(open_question)
                open_question = {"element": element, "type": kind, "question": text}
            elif name in ("c", "o"):
                open_question["choices"] = text
            else:
                found.append({**open_question, "answer": text})
                open_question = {}
    ignored["question without an answer"] += bool(open_question)
    return _tifa_questions(found, ignored)


def parse_tifa_json(answer: str) -> tuple[list[Question], Counter[str]]:
    """Read a JSON list of questions; an incomplete or senseless question is counted."""
    value = _unwrapped(_json_value(answer))
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
    kind, text, given = (text_of(each.get(key)) for key in ("type", "question", "answer"))
    kind = kind.lower().strip(" .")
    choices = _choices(each.get("choices"))
    answer = choice_of(given, choices)
    if kind not in TIFA_TYPES:
        fault = "unknown type"
    elif not text:
        fault = "empty question"
    elif text in seen:
        fault = "duplicated question"
    elif len(choices) < 2:
        fault = "fewer than two choices"
    elif answer is None:
        fault = "answer that is no choice"
    else:
        fault = None
    return fault, kind, text, choices, answer or ""


def _choices(listed: Any) -> tuple[str, ...]:
    """Return choices that are listed, or written with commas; a full stop after the last is none of it."""
    if isinstance(listed, str):
        listed = listed.strip().removesuffix(".").split(",")
    elif isinstance(listed, dict):
        listed = listed.values()
    elif not isinstance(listed, list):
        return ()
    return tuple(dict.fromkeys(text for each in listed if (text := text_of(each))))


def _unwrapped(value: Any) -> Any:
    """Return the list or object that is all there is of an object, such as {"questions": [...]}."""
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if not key.strip().isdecimal() and isinstance(inner, (list, dict)):
            return inner
    return value


def _numbered_text(key: str | int, each: Any, call: Call) -> tuple[int | None, str]:
    """Return the id and the text of an item, which may be an object of its own; None for an id that is no number."""
    if isinstance(each, dict):
        names = {str(name).strip().lower(): value for name, value in each.items()}
        key = next((names.pop(name) for name in _ID_KEYS if name in names), key)
        if len(names) == 1 and (alone := next(iter(names))).isdecimal():  # {"1": "a tuple"} in a list
            key = alone
        wanted = next((name for name in _TEXT_KEYS[call] if name in names), None)
        each = names[wanted] if wanted else next(iter(names.values())) if len(names) == 1 else None
    number = text_of(key).strip(" .")
    if isinstance(each, list):
        text = ",".join(map(text_of, each)) or "0"
    else:
        text = "" if isinstance(each, dict) else " ".join(text_of(each).split())
    return int(number) if number.isdecimal() else None, text


def _json_value(answer: str) -> Any:
    """Return the first JSON list or object in what a model said after its thoughts; None where there is none that is whole.

    Brackets of prose, in which not one value can be read, are passed over; JSON that breaks off is not read in parts.
    """
    said = split_thoughts(answer)[1]
    for bracket in islice(re.finditer(r"[\[{]", said), _TRIED_BRACKETS):
        try:
            return json.JSONDecoder(parse_constant=refuse_constant).raw_decode(said, bracket.start())[0]
        except json.JSONDecodeError as error:
            if said[bracket.end() : error.pos].strip() or said[error.pos : error.pos + 1] == '"':
                return None
        except (ValueError, RecursionError):
            return None
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
