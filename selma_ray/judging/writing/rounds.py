"""Questions for many prompts in rounds of calls: what an answer lacks is asked again, then done without, and counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selma_ray.judging.questions import Question
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.examples import load_dsg_examples, load_tifa_examples
from selma_ray.judging.writing.parsing import (
    Parsed,
    parse_json,
    parse_lines,
    parse_parents,
    parse_tifa_json,
    parse_tifa_text,
    tuple_category,
)
from selma_ray.judging.writing.requests import Call, dsg_json, dsg_schema, dsg_text, tifa_json, tifa_schema, tifa_text
from selma_ray.records import seed_of

__all__ = ["Ask", "Draft", "Reply", "Request", "draft_questions"]

_RETRY_TEMPERATURE = 0.7
_NO_PARENTS = "no usable dependencies"


@dataclass(frozen=True)
class Request:
    """One call: its text, how to sample, and the schema that holds its answer where there is one."""

    key: str
    text: str
    temperature: float
    seed: int
    stop: str
    schema: str | None = None


@dataclass(frozen=True)
class Reply:
    """The language model's answer to a request; empty, with an error, where it gave none."""

    text: str
    error: str | None = None


Ask = Callable[[Sequence[Request]], Mapping[str, Reply]]
"""Answers requests by their keys, in whatever order."""


@dataclass
class Draft:
    """The questions of one prompt as far as they have come; `failure` says why there are none."""

    prompt: str
    questions: tuple[Question, ...] = ()
    repaired: Counter[str] = field(default_factory=Counter)
    failure: str | None = None
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


def draft_questions(prompts: Sequence[str], config: WriterConfig, ask: Ask) -> list[Draft]:
    """Return the questions of each prompt; a prompt without any has a failure, and is not left out.

    What was repaired is counted by kind: lines ignored, parents dropped, calls whose ids did not match those of the tuples.
    """
    drafts = [Draft(prompt) for prompt in prompts]
    for index, draft in enumerate(drafts):
        if not draft.prompt.strip():
            drafts[index] = replace(draft, failure="the prompt is empty")
    writer = _Tifa(config) if config.style == "tifa" else _Dsg(config)
    while requests := {
        request.key: (draft, call, request)
        for index, draft in enumerate(drafts)
        if draft.failure is None
        for call in writer.missing(draft)
        if draft.attempts[call] < config.attempts
        for request in [writer.request(index, draft, call)]
    }:
        replies = ask([request for _, _, request in requests.values()])
        for key, (draft, call, _) in requests.items():
            draft.attempts[call] += 1
            reply = replies.get(key, Reply("", "no reply came"))
            if reply.error:
                draft.errors.append(reply.error)
            writer.read(draft, call, reply.text)
    for draft in drafts:
        if draft.failure is None:
            writer.finish(draft)
            if not draft.questions:
                draft.failure = draft.errors[-1] if draft.errors else "no answer could be read"
    return drafts


class _Dsg:
    """DSG's three calls: tuples, then questions and dependencies of them."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._examples = load_dsg_examples(config)

    def missing(self, draft: Draft) -> Iterable[Call]:
        """Yield the calls whose answers are not there yet."""
        if "tuple" not in draft.texts:
            yield "tuple"
            return
        calls: tuple[Call, Call] = ("question", "dependency")
        yield from (call for call in calls if draft.texts.get(call, {}).keys() != draft.texts["tuple"].keys())

    def request(self, index: int, draft: Draft, call: Call) -> Request:
        """Return a call about a prompt."""
        compose = dsg_json if self._config.format == "json" else dsg_text
        tuples = draft.texts.get("tuple", {})
        text = compose(call, draft.prompt, tuples, self._examples)
        schema = dsg_schema(call, list(tuples)) if self._config.format == "json" else None
        return _request(index, draft, call, text, "\ninput:", schema, self._config)

    def read(self, draft: Draft, call: Call, answer: str) -> None:
        """Keep the answer of a call; of several answers to one call the one that fits the most tuples stays."""
        parsed: Parsed = parse_json(answer, call) if self._config.format == "json" else parse_lines(answer)
        draft.repaired.update(parsed.ignored)
        if call == "tuple":
            if parsed.texts:
                draft.texts[call] = parsed.texts
            return
        wanted = draft.texts["tuple"].keys()
        if parsed.texts.keys() != wanted:
            draft.repaired[f"{call} call with other ids"] += 1
        best = draft.texts.get(call, {})
        if len(parsed.texts.keys() & wanted) > len(best.keys() & wanted) or parsed.texts.keys() == wanted:
            draft.texts[call] = parsed.texts

    def finish(self, draft: Draft) -> None:
        """Put the three answers together; without fitting dependencies every question hangs on the root."""
        tuples, questions = draft.texts.get("tuple", {}), draft.texts.get("question", {})
        ids = [number for number in tuples if number in questions]
        draft.repaired["tuple without a question"] += len(tuples) - len(ids)
        dependencies = draft.texts.get("dependency", {})
        if ids and dependencies.keys() != tuples.keys():
            draft.repaired[_NO_PARENTS] += 1
            dependencies = {}
        parents, dropped = parse_parents(dependencies, ids)
        draft.repaired.update(dropped)
        draft.repaired = +draft.repaired
        draft.questions = tuple(
            Question(number, tuple_category(tuples[number]), questions[number], parents[number]) for number in ids
        )


class _Tifa:
    """TIFA's one call."""

    def __init__(self, config: WriterConfig) -> None:
        self._config = config
        self._examples = load_tifa_examples(config)

    def missing(self, draft: Draft) -> Iterable[Call]:
        """Yield the call as long as there are no questions."""
        if not draft.questions:
            yield "tifa"

    def request(self, index: int, draft: Draft, call: Call) -> Request:
        """Return the call about a prompt."""
        is_json = self._config.format == "json"
        text = (tifa_json if is_json else tifa_text)(draft.prompt, self._examples)
        return _request(index, draft, call, text, "\nDescription:", tifa_schema() if is_json else None, self._config)

    def read(self, draft: Draft, call: Call, answer: str) -> None:
        """Keep the questions that can be used."""
        questions, ignored = (parse_tifa_json if self._config.format == "json" else parse_tifa_text)(answer)
        draft.repaired.update(ignored)
        draft.questions = tuple(questions)

    def finish(self, draft: Draft) -> None:
        """Nothing is left to do."""


def _request(index: int, draft: Draft, call: Call, text: str, stop: str, schema: Any, config: WriterConfig) -> Request:
    attempt = draft.attempts[call]
    return Request(
        f"{index}:{call}:{attempt}",
        text,
        0.0 if attempt == 0 else _RETRY_TEMPERATURE,
        seed_of(config.seed, prompt=draft.prompt, call=call, attempt=attempt),
        stop,
        None if schema is None else json.dumps(schema),
    )
