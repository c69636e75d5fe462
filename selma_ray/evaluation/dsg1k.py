"""DSG-1k's own files: annotations, released VQA answers, and their dirt, read as the reference readers do."""

import csv
from collections.abc import Mapping
from pathlib import Path

from selma_ray.errors import JudgeError
from selma_ray.evaluation.dsg import Answered

__all__ = ["parse_parents", "read_answers", "read_parents"]


def parse_parents(text: str, strip: bool = True) -> tuple[int, ...]:
    """Parse a dependency cell such as "1,2"; without `strip`, as SELMA's release reads it, "1, 2" loses parent 2.

    Raises ValueError where a part is no number.
    """
    parts = text.split(",")
    return tuple(int(part) for part in parts if strip or part == part.strip())


def read_parents(annotations: Path, strip: bool = True) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return {item: {question: parents}} of dsg-1k-anns.csv; an item with a malformed cell has no dependencies at all.

    That is what the official loader makes of cells such as "5, right".
    """
    items: dict[str, dict[int, tuple[int, ...]]] = {}
    malformed: set[str] = set()
    for row in _rows(annotations):
        item, question = row["item_id"], int(row["proposition_id"])
        try:
            parents = parse_parents(row["dependency"], strip)
        except ValueError:
            malformed.add(item)
            parents = ()
        items.setdefault(item, {})[question] = parents
    return {item: dict.fromkeys(parents, ()) if item in malformed else parents for item, parents in items.items()}


def read_answers(
    answers: Path, parents: Mapping[str, Mapping[int, tuple[int, ...]]]
) -> dict[str, dict[str, list[Answered]]]:
    """Return {model: {item: answered questions}} of a released *_dsg.csv file."""
    models: dict[str, dict[str, list[Answered]]] = {}
    for row in _rows(answers):
        item, question = row["item_id"], int(row["question_id"])
        answered = Answered(question, row["answer"], parents[item].get(question, ()))
        models.setdefault(row["t2i_model"], {}).setdefault(item, []).append(answered)
    return models


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise JudgeError(f"{path} cannot be read ({error}); name a file of DSG-1k's release") from None
