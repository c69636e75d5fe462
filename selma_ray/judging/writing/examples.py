"""In-context examples of questions: a few of our own, or a file of the user's."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selma_ray.errors import JudgeError
from selma_ray.json_lines import ENCODING, numbered_lines, parse_json
from selma_ray.judging.writing.config import WriterConfig

__all__ = ["DsgExample", "TifaExample", "load_dsg_examples", "load_tifa_examples"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class DsgExample:
    """A prompt with its tuples and, in the same order, their questions and what they depend on ("1,2", or "0")."""

    prompt: str
    tuples: tuple[str, ...]
    questions: tuple[str, ...]
    dependencies: tuple[str, ...]


@dataclass(frozen=True)
class TifaExample:
    """A prompt with its concepts by kind and its questions: element, type, question, choices, answer."""

    prompt: str
    questions: tuple[dict[str, Any], ...]
    concepts: dict[str, list[str]] = field(default_factory=dict)


def load_dsg_examples(config: WriterConfig) -> list[DsgExample]:
    """Return the examples that `config` names; raises JudgeError, with the line, for a file that cannot be used."""
    if config.examples is None:
        return [_dsg_example(row, "ours") for row in _json_lines(_FOLDER / "examples.jsonl")][: config.max_examples]
    path = Path(config.examples)
    examples = _from_csv(path) if path.suffix == ".csv" else [_dsg_example(row, path) for row in _json_lines(path)]
    return _some(examples, path)[: config.max_examples]


def load_tifa_examples(config: WriterConfig) -> list[TifaExample]:
    """Return the examples that `config` names; raises JudgeError for a file that cannot be used."""
    path = _FOLDER / "examples_tifa.jsonl" if config.examples is None else Path(config.examples)
    try:
        examples = [
            TifaExample(row["prompt"], tuple(row["questions"]), row.get("concepts", {})) for row in _json_lines(path)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise JudgeError(
            f"examples {path} must have prompt and questions in every line, lacks {error}; fix it"
        ) from None
    return _some(examples, path)[: config.max_examples]


def _dsg_example(row: dict[str, Any], source: object) -> DsgExample:
    try:
        parts = [tuple(map(str, row[key])) for key in ("tuples", "questions", "dependencies")]
        example = DsgExample(str(row["prompt"]), *parts)
    except (KeyError, TypeError) as error:
        raise JudgeError(
            f"examples {source} must have prompt, tuples, questions and dependencies in every line, lacks {error}; fix it"
        ) from None
    if len({len(part) for part in parts}) != 1:
        raise JudgeError(
            f"examples {source} must have as many questions and dependencies as tuples, got {[len(part) for part in parts]} "
            f"for {example.prompt[:60]!r}; fix it"
        )
    return example


def _from_csv(path: Path) -> list[DsgExample]:
    """Read DSG's own annotations (tifa160-dev-anns.csv, dsg-1k-anns.csv): a row a question, an item's rows together."""
    columns = ("text", "tuple", "question_natural_language", "dependency")
    items: dict[str, list[tuple[str, ...]]] = {}
    try:
        with path.open(newline="", encoding=ENCODING) as stream:
            for row in csv.DictReader(stream):
                items.setdefault(row["item_id"], []).append(tuple(row[column] for column in columns))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise JudgeError(f"examples {path} cannot be read as DSG's annotations ({error}); name another file") from None
    return [
        DsgExample(rows[0][0], *(tuple(column) for column in list(zip(*rows, strict=True))[1:]))
        for rows in items.values()
    ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for _, line in numbered_lines(path)]
    except (OSError, ValueError) as error:
        raise JudgeError(f"examples {path} cannot be read as JSON Lines ({error}); name another file") from None


def _some(examples: Sequence[Any], path: Path) -> list[Any]:
    if not examples:
        raise JudgeError(f"examples {path} must hold at least one example, holds none; add some or name no file")
    return list(examples)
