"""What the language model is asked: DSG's text format letter by letter, TIFA's, and JSON of the same content with its schema."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from selma_ray.judging.writing.examples import DsgExample, TifaExample

__all__ = [
    "DSG_CALLS",
    "TIFA_TYPES",
    "Call",
    "dsg_json",
    "dsg_schema",
    "dsg_text",
    "tifa_json",
    "tifa_schema",
    "tifa_text",
]

Call = Literal["tuple", "question", "dependency", "tifa"]
DSG_CALLS: tuple[Call, ...] = ("tuple", "question", "dependency")

TIFA_TYPES = (
    "object", "human", "animal", "food", "activity", "attribute", "counting", "color", "material", "spatial", "location", "shape",
    "other",
)  # fmt: skip

_PREAMBLES: Mapping[Call, str] = {
    "tuple": (
        "Task: given input prompts, describe each scene with skill-specific tuples.\n"
        "Do not generate same tuples again. Do not generate tuples that are not explicitly described in the prompts.\n"
        "output format: id | tuple"
    ),
    "question": (
        "Task: given input prompts and skill-specific tuples, re-write tuple each in natural language question.\n"
        "output format: id | question"
    ),
    "dependency": (
        "Task: given input prompts and tuples, describe the parent tuples of each tuple.\n"
        "output format: id | dependencies (comma separated)"
    ),
}
_JSON_FORMATS: Mapping[Call, str] = {
    "tuple": "output format: a JSON list of tuples, as strings",
    "question": "output format: a JSON object from each id to its question",
    "dependency": "output format: a JSON object from each id to the list of its parents' ids, empty where it has none",
}

_TIFA_PREAMBLE = (
    "Given an image description, generate one or two multiple-choice questions for each concept that verify whether an image "
    "shows it.\nClassify each concept into a type ({types}), and then generate a question for each type."
)
_TIFA_JSON = "Answer with a JSON list of questions, each with element, type, question, choices and answer."

_MAX_ITEMS = 40
_TEXT = {"type": "string", "minLength": 1, "maxLength": 200}


def dsg_text(call: Call, prompt: str, tuples: Mapping[int, str], examples: Sequence[DsgExample]) -> str:
    """Return the reference's request (j-min/DSG, query_utils.make_prompt); `tuples` are shown in the second and third call."""
    shown = [f"input: {_shown(call, each).strip()}\noutput: {_answer(call, each).strip()}" for each in examples]
    listed = "\n".join(f"{number} | {text}" for number, text in tuples.items())
    request = prompt if call == "tuple" else f"{prompt}\n{listed}"
    return "\n\n".join([_PREAMBLES[call], *shown, f"input: {request}\noutput: "])


def dsg_json(call: Call, prompt: str, tuples: Mapping[int, str], examples: Sequence[DsgExample]) -> str:
    """Return a request of the same content whose answers are JSON."""
    preamble = _PREAMBLES[call].rpartition("\n")[0] + "\n" + _JSON_FORMATS[call]
    shown = [f"input: {_shown(call, each).strip()}\noutput: {_json_answer(call, each)}" for each in examples]
    listed = "\n".join(f"{number} | {text}" for number, text in tuples.items())
    request = prompt if call == "tuple" else f"{prompt}\n{listed}"
    return "\n\n".join([preamble, *shown, f"input: {request}\noutput: "])


def dsg_schema(call: Call, ids: Sequence[int]) -> dict[str, Any]:
    """Return the schema of a call's answer; the second and third answer for exactly the ids of the first."""
    if call == "tuple":
        return {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": _MAX_ITEMS}
    parents = {"type": "array", "items": {"type": "integer", "enum": [0, *ids]}, "maxItems": 8}
    value = _TEXT if call == "question" else parents
    names = [str(each) for each in ids]
    return {
        "type": "object", "properties": dict.fromkeys(names, value), "required": names, "additionalProperties": False
    }  # fmt: skip


def tifa_text(prompt: str, examples: Sequence[TifaExample]) -> str:
    """Return a request in TIFA's text format (tifascore/question_gen.py): concepts by kind, then questions about each."""
    shown = [f"Description: {each.prompt}\n{_concepts(each)}{_questions(each)}" for each in examples]
    preamble = _TIFA_PREAMBLE.format(types=", ".join(TIFA_TYPES))
    return "\n\n".join([preamble, *shown, f"Description: {prompt}\nEntities"])


def tifa_json(prompt: str, examples: Sequence[TifaExample]) -> str:
    """Return a request of the same content whose answer is JSON."""
    preamble = f"{_TIFA_PREAMBLE.format(types=', '.join(TIFA_TYPES))}\n{_TIFA_JSON}"
    shown = [f"Description: {each.prompt}\nQuestions: {json.dumps(each.questions)}" for each in examples]
    return "\n\n".join([preamble, *shown, f"Description: {prompt}\nQuestions: "])


def tifa_schema() -> dict[str, Any]:
    """Return the schema of an answer about one prompt."""
    properties = {
        "element": _TEXT,
        "type": {"type": "string", "enum": list(TIFA_TYPES)},
        "question": _TEXT,
        "choices": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 60}, "minItems": 2, "maxItems": 4},
        "answer": {"type": "string", "minLength": 1, "maxLength": 60},
    }  # fmt: skip
    question = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip
    return {"type": "array", "items": question, "minItems": 1, "maxItems": _MAX_ITEMS}


def _shown(call: Call, example: DsgExample) -> str:
    return example.prompt if call == "tuple" else "\n".join([example.prompt, *_numbered(example.tuples)])


def _answer(call: Call, example: DsgExample) -> str:
    texts = {"tuple": example.tuples, "question": example.questions, "dependency": example.dependencies}
    return "\n".join(_numbered(texts[call]))


def _numbered(texts: Sequence[str]) -> list[str]:
    """Return numbered lines; runs of white space become one space, as in the reference."""
    return [" ".join(f"{number} | {text}".split()) for number, text in enumerate(texts, start=1)]


def _json_answer(call: Call, example: DsgExample) -> str:
    if call == "tuple":
        return json.dumps(example.tuples)
    if call == "question":
        return json.dumps({str(number): text for number, text in enumerate(example.questions, start=1)})
    parents = [
        [int(each) for each in text.split(",") if each.strip().isdecimal() and int(each)]
        for text in example.dependencies
    ]
    return json.dumps({str(number): each for number, each in enumerate(parents, start=1)})


def _concepts(example: TifaExample) -> str:
    return "".join(f"{kind}: {', '.join(each)}".rstrip() + "\n" for kind, each in example.concepts.items())


def _questions(example: TifaExample) -> str:
    lines = ["Questions and answers are below:"]
    concept = None
    for each in example.questions:
        if concept != (each["element"], each["type"]):
            concept = (each["element"], each["type"])
            lines.append(f"About {each['element']} ({each['type']}):")
        lines += [f"Q: {each['question']}", f"Choices: {', '.join(each['choices'])}", f"A: {each['answer']}"]
    return "\n".join(lines)
