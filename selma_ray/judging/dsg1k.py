"""DSG-1k's own files: annotations, released VQA answers of any judge, read with their flaws as the reference readers do."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from selma_ray.errors import JudgeError
from selma_ray.json_lines import ENCODING
from selma_ray.judging.dsg import Answered

__all__ = ["annotation_rows", "complete", "parse_parents", "read_answers", "read_parents"]

# The reference scores an item without any released answer as one question that is not answered yes (t2i_eval_dsg1k.py).
_UNANSWERED = Answered(1, "")

_ANNOTATION_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
                       "question_natural_language")  # fmt: skip
_ANSWER_COLUMNS = ("t2i_model", "item_id", "question_id", "answer")


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
    for row in annotation_rows(annotations):
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
    """Return {model: {item: answered questions}} of a released *_dsg.csv file, of whichever judge.

    Of a question that is answered twice the last answer counts, as in the reference. Raises JudgeError for a file that lacks a
    column, an item that the annotations lack, and a question id that is no number.
    """
    models: dict[str, dict[str, dict[int, Answered]]] = {}
    for line, row in enumerate(_rows(answers, _ANSWER_COLUMNS), start=2):
        item, question = row["item_id"], _question_id(row["question_id"], answers, line)
        if item not in parents:
            raise JudgeError(
                f"{answers} line {line} answers item {item!r}, which the annotations lack; name its own annotations"
            )
        answered = Answered(question, row["answer"], parents[item].get(question, ()))
        models.setdefault(row["t2i_model"], {}).setdefault(item, {})[question] = answered
    return {
        model: {item: list(by_question.values()) for item, by_question in items.items()}
        for model, items in models.items()
    }


def complete(answers: Mapping[str, list[Answered]], items: Iterable[str]) -> dict[str, list[Answered]]:
    """Return the answers of all `items`, with the reference's stand-in (which scores 0) for one without any answer."""
    return {item: answers.get(item) or [_UNANSWERED] for item in items}


def annotation_rows(annotations: Path) -> list[dict[str, str]]:
    """Return the rows of dsg-1k-anns.csv, one a question; raises JudgeError for a file of another kind."""
    return _rows(annotations, _ANNOTATION_COLUMNS)


def _question_id(text: str, path: Path, line: int) -> int:
    try:
        return int(float(text))
    except ValueError:
        raise JudgeError(f"{path} line {line}: question_id must be a number, got {text!r}; fix the file") from None


def _rows(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding=ENCODING) as stream:
            rows = list(csv.DictReader(stream, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JudgeError(f"{path} cannot be read ({error}); name a file of DSG-1k's release") from None
    missing = [column for column in columns if rows and column not in rows[0]]
    if missing or not rows:
        lacking = f"column {missing[0]}" if missing else "rows"
        raise JudgeError(f"{path} must be a file of DSG-1k's release, lacks {lacking}; name another")
    return rows
