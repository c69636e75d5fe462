"""Question sets as files that can be read, corrected and used as suites; what a file holds already is not asked again."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selma_ray.errors import JudgeError
from selma_ray.json_lines import json_lines, numbered_lines, parse_json
from selma_ray.judging.tifa import CaptionAnswerer, filter_questions
from selma_ray.judging.writing.config import QuestionLLMConfig, WriterConfig
from selma_ray.judging.writing.rounds import Ask, Draft, draft_questions
from selma_ray.models.locate import locate_llm
from selma_ray.records import content_id
from selma_ray.storage import RunFolder
from selma_ray.words import has_letter_or_digit

__all__ = [
    "DraftLines",
    "PromptToAsk",
    "Written",
    "draft_lines",
    "generator_name",
    "question_llm",
    "read_prompts",
    "write_questions",
]

logger = logging.getLogger(__name__)

_FORMAT_VERSION = "v1"  # changes with the words of the requests


@dataclass(frozen=True)
class PromptToAsk:
    """A prompt that questions are to be written about."""

    id: str
    skill: str
    prompt: str


@dataclass(frozen=True)
class Written:
    """How many prompts have questions, how many were there before, how many failed, and what was repaired, by kind."""

    prompts: int
    reused: int
    failed: int
    repaired: dict[str, int]


DraftLines = Callable[[Sequence[str]], Sequence[Mapping[str, Any]]]
"""Writes questions about prompts and returns a line for each: {prompt, questions, repaired}, or {prompt, failure, attempts, repaired}."""


def draft_lines(
    prompts: Sequence[str], config: WriterConfig, ask: Ask, answerer: CaptionAnswerer | None = None
) -> list[dict[str, Any]]:
    """Return a line for each prompt, its questions written by `ask`.

    TIFA questions that `answerer` does not answer rightly from the prompt alone are dropped and counted.
    """
    drafts = draft_questions(prompts, config, ask) if prompts else []
    if answerer is not None and config.style == "tifa":
        for draft in drafts:
            _drop_unanswered(draft, answerer)
    return list(map(_line, drafts))


def write_questions(prompts: Sequence[PromptToAsk], config: WriterConfig, path: Path, draft: DraftLines) -> Written:
    """Write a suite file with questions for every prompt that has none in it yet; a prompt whose text has changed is asked again.

    Prompts that fail stand in a file beside it, with their reasons, and are tried again the next time. Raises JudgeError for a file
    that another generator wrote.
    """
    _check_ids(prompts)
    generator = generator_name(config)
    found = _read(path, generator)
    pending = [each for each in prompts if found.get(each.id, {}).get("prompt") != each.prompt]
    drafted = draft([each.prompt for each in pending])
    made = {
        each.id: {**line, **asdict(each), "generator": generator} for each, line in zip(pending, drafted, strict=True)
    }
    lines = [
        line
        for each in prompts
        if (line := made.get(each.id, found.get(each.id))) is not None and "failure" not in line
    ]
    failures = [line for line in made.values() if "failure" in line]
    _write(path, lines)
    _write(path.with_suffix(".failed.jsonl"), failures)
    if failures:
        logger.warning(
            "%d of %d prompts have no questions, see %s", len(failures), len(prompts), path.with_suffix(".failed.jsonl")
        )
    repaired = sum((Counter(line["repaired"]) for line in drafted), Counter[str]())
    return Written(len(lines), len(prompts) - len(pending), len(failures), dict(repaired))


def question_llm(config: WriterConfig) -> QuestionLLMConfig:
    """Return the language model that writes; default: the miniature's."""
    return config.llm or QuestionLLMConfig()


def generator_name(config: WriterConfig) -> str:
    """Return a name for all that questions depend on: the model, the style and format, the examples, the seed."""
    llm = question_llm(config)
    located = locate_llm(llm.name, llm.revision)
    examples = (
        "ours"
        if config.examples is None
        else content_id(examples=Path(config.examples).read_text(errors="replace"))[:12]
    )
    return (
        f"{llm.name}@{located.revision}#{config.style}-{config.format}-{_FORMAT_VERSION}-{examples}"
        f"x{config.max_examples}-{config.seed}" + (f"+{config.caption_model}" if config.caption_model else "")
    )


def read_prompts(path: Path) -> list[PromptToAsk]:
    """Read prompts: a text file of one a line, or JSON Lines of {"prompt"} with "id" and "skill" where there are any.

    Raises JudgeError, with the line, for one that cannot be read.
    """
    try:
        lines = numbered_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"{path} cannot be read ({error}); name a text or JSON Lines file of prompts") from None
    if not lines:
        raise JudgeError(f"{path} must hold at least one prompt, holds none; add some")
    is_text = path.suffix == ".txt"
    return [_prompt_to_ask({"prompt": line} if is_text else line, path, number) for number, line in lines]


def _prompt_to_ask(line: str | dict[str, Any], path: Path, number: int) -> PromptToAsk:
    try:
        row = parse_json(line) if isinstance(line, str) else line
        text = row["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{path} line {number} must be a JSON object with a prompt ({error}); fix it") from None
    names = {"id": content_id(prompt=text), "skill": path.stem}
    values = {"prompt": text} | {name: row[name] for name in names if row.get(name) is not None}
    for name, value in values.items():
        fits = isinstance(value, str) or (name == "id" and type(value) is int)
        if not fits or (name == "prompt" and not has_letter_or_digit(value)):
            raise JudgeError(f"{path} line {number}: {name} must be a text, got {json.dumps(value)}; fix it")
    return PromptToAsk(**{name: str(value) for name, value in (names | values).items()})


def _drop_unanswered(draft: Draft, answerer: CaptionAnswerer) -> None:
    if draft.failure is not None:
        return
    kept = tuple(filter_questions(draft.questions, draft.prompt, answerer))
    draft.repaired["question that the prompt does not answer"] += len(draft.questions) - len(kept)
    draft.repaired = +draft.repaired
    draft.questions = kept
    if not kept:
        draft.failure = "the prompt answers none of its questions"


def _check_ids(prompts: Sequence[PromptToAsk]) -> None:
    repeated = [each for each, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise JudgeError(
            f"prompts must have different ids, {len(repeated)} are used again, first {repeated[0]!r}; rename them"
        )


def _line(draft: Draft) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": draft.prompt, "repaired": dict(draft.repaired)}
    if draft.failure is not None:
        return line | {"failure": draft.failure, "attempts": dict(draft.attempts)}
    return line | {"questions": [asdict(each) for each in draft.questions]}


def _read(path: Path, generator: str) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        lines = [parse_json(line) for _, line in numbered_lines(path)]
        others = {line["generator"] for line in lines} - {generator}
        found = {line["id"]: line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{path} is no file of written questions ({error}); name another file") from None
    if others:
        raise JudgeError(f"{path} was written by {min(others)}, not by {generator}; name another file or delete it")
    return found


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    RunFolder(str(path.absolute().parent)).write_bytes(json_lines(lines), path.name)
