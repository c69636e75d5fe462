"""Suites of prompts by name, read in their publishers' own formats and downloaded once into the user's cache.

    miniature   the miniature's 500 held-out captions, with DSG questions from its grammar
                (miniature-exact: and whether there is exactly one where a caption says “a”)
    dsg1k       DSG-1k (Cho et al. 2024): 1,060 prompts from ten sources, with DSG questions
    tifa        TIFA v1.0 (Hu et al. 2023): 4,081 captions, with multiple-choice questions
    geneval     GenEval (Ghosh et al. 2023): 553 prompts of six tasks; its own scores need a detector, see `geneval.py`
    parti       PartiPrompts (Yu et al. 2022): 1,632 prompts

The last two bring no questions for a judge: each prompt is asked VQAScore's one question.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selma_ray.errors import JudgeError
from selma_ray.json_lines import ENCODING, numbered_lines, parse_json
from selma_ray.judging.answers import text_of
from selma_ray.judging.downloads import SuiteFile, fetch
from selma_ray.judging.dsg1k import annotation_rows, read_parents
from selma_ray.judging.questions import PromptWithQuestions, Question, read_suite, spread_over_skills
from selma_ray.judging.soft import vqascore_question
from selma_ray.judging.sources import grammar_questions
from selma_ray.miniature import world
from selma_ray.records import content_id

__all__ = ["MINIATURE", "MINIATURE_EXACT", "SUITES", "Suite", "open_suite", "suite_folder"]

MINIATURE, MINIATURE_EXACT = "miniature", "miniature-exact"

_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Suite:
    """A suite's files and what reads them, in that order."""

    files: tuple[SuiteFile, ...]
    read: Callable[..., list[PromptWithQuestions]]


def open_suite(name: str, max_prompts: int | None = None) -> list[PromptWithQuestions]:
    """Return a named suite, or the one in a JSON Lines file, cut to `max_prompts` spread evenly over its skills.

    Raises JudgeError where a file can neither be found nor downloaded, or breaks its format.
    """
    suite = _opened(name)
    return suite if max_prompts is None else spread_over_skills(suite, max_prompts)


def _opened(name: str) -> list[PromptWithQuestions]:
    if name in (MINIATURE, MINIATURE_EXACT):
        exact_counts = name == MINIATURE_EXACT
        return [
            PromptWithQuestions(content_id(prompt=caption), skill, caption, grammar_questions(caption, exact_counts))
            for skill, captions in world.heldout_by_skill().items()
            for caption in captions
        ]
    if name not in SUITES:
        return read_suite(Path(name))
    suite = SUITES[name]
    paths = [fetch(file, suite_folder() / name, name) for file in suite.files]
    try:
        prompts = suite.read(*paths)
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(
            f"evaluation.suite {name}: {paths[-1]} is not in its format ({type(error).__name__} {error}); delete it to have it "
            "downloaded again"
        ) from None
    return prompts


def suite_folder() -> Path:
    """Return the folder of downloaded suites, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selma_ray" / "suites"


def _read_dsg1k(annotations: Path) -> list[PromptWithQuestions]:
    """Read dsg-1k-anns.csv; a parent that is not there is left out, as no score can depend on it."""
    parents = read_parents(annotations)
    rows: dict[str, list[Mapping[str, str]]] = {}
    for row in annotation_rows(annotations):
        rows.setdefault(row["item_id"], []).append(row)
    return [
        PromptWithQuestions(
            item, item.rpartition("_")[0], of_item[0]["text"], tuple(_dsg_questions(of_item, parents[item]))
        )
        for item, of_item in rows.items()
    ]


def _dsg_questions(rows: Sequence[Mapping[str, str]], parents: Mapping[int, tuple[int, ...]]) -> list[Question]:
    questions = {}
    for row in rows:
        number = int(row["proposition_id"])
        there = tuple(parent for parent in parents[number] if parent == 0 or parent in parents)
        category = row["category_detailed"].strip("- ") or row["category_broad"]
        questions[number] = Question(number, category, row["question_natural_language"], there)
    return list(questions.values())


def _read_tifa(text_inputs: Path, question_answers: Path) -> list[PromptWithQuestions]:
    asked: dict[str, list[Question]] = {}
    for row in _json(question_answers):
        of_caption = asked.setdefault(row["id"], [])
        choices = tuple(map(text_of, row["choices"]))
        of_caption.append(
            Question(len(of_caption) + 1, row["element_type"], row["question"], (), choices, text_of(row["answer"]))
        )
    return [
        PromptWithQuestions(row["id"], row["id"].rpartition("_")[0], row["caption"], tuple(asked[row["id"]]))
        for row in _json(text_inputs)
        if row["id"] in asked
    ]


def _read_geneval(metadata: Path) -> list[PromptWithQuestions]:
    rows = [parse_json(line) for _, line in numbered_lines(metadata)]
    return [_asked_for_the_whole(row["prompt"], row["tag"], row["tag"]) for row in rows]


def _read_parti(prompts: Path) -> list[PromptWithQuestions]:
    with prompts.open(newline="", encoding=ENCODING) as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    by_prompt = {row["Prompt"]: row for row in rows if row["Prompt"].strip()}
    return [_asked_for_the_whole(prompt, row["Category"], row["Challenge"]) for prompt, row in by_prompt.items()]


def _asked_for_the_whole(prompt: str, skill: str, category: str) -> PromptWithQuestions:
    question = Question(1, category, vqascore_question(prompt))
    return PromptWithQuestions(content_id(prompt=prompt, skill=skill), skill, prompt, (question,))


def _json(path: Path) -> list[dict[str, Any]]:
    return parse_json(path.read_text(encoding=ENCODING))


SUITES: Mapping[str, Suite] = {
    "dsg1k": Suite(
        (
            SuiteFile(
                "dsg-1k-anns.csv",
                f"{_RAW}/j-min/DSG/main/dsg-1k-anns.csv",
                "b7ce06ea8a0478ccfd8fba105ecd26d7d301eb99d5c412987546c4cc8e08917a",
            ),
        ),
        _read_dsg1k,
    ),
    "tifa": Suite(
        (
            SuiteFile("tifa_v1.0_text_inputs.json", f"{_RAW}/Yushi-Hu/tifa/main/tifa_v1.0/tifa_v1.0_text_inputs.json"),
            SuiteFile(
                "tifa_v1.0_question_answers.json",
                f"{_RAW}/Yushi-Hu/tifa/main/tifa_v1.0/tifa_v1.0_question_answers.json",
            ),
        ),
        _read_tifa,
    ),
    "geneval": Suite(
        (
            SuiteFile(
                "evaluation_metadata.jsonl",
                f"{_RAW}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        ),
        _read_geneval,
    ),
    "parti": Suite(
        (
            SuiteFile(
                "PartiPrompts.tsv",
                f"{_RAW}/google-research/parti/main/PartiPrompts.tsv",
                "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
            ),
        ),
        _read_parti,
    ),
}
"""The suites that have files of their own; the miniature's have none."""
