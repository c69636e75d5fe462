"""The questions about a run's captions, from the source that its recipe means, and those that a language model has yet to write."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from selma_ray.judging.sources import (
    GrammarQuestions,
    KnownQuestions,
    OrWhole,
    QuestionSource,
    WholeQuestion,
    questions_of_suite,
    without_questions,
)
from selma_ray.judging.writing.written import WrittenQuestions
from selma_ray.progress import Progress, Report
from selma_ray.prompts.progress import read_prompt_progress
from selma_ray.prompts.store import read_prompts
from selma_ray.records import Split
from selma_ray.run.opening import Run
from selma_ray.run.question_source import source_name, splits_judged, writer_of

__all__ = ["open_source", "question_counts", "questions_beside", "write_questions"]

_POLL_S = 2.0


def open_source(run: Run) -> QuestionSource:
    """Return the source of a run's questions as far as they are there; where it has none, it has the one about the whole prompt."""
    return OrWhole(_source(run))


def _source(run: Run) -> QuestionSource:
    match source_name(run.recipe):
        case "grammar":
            return GrammarQuestions(run.recipe.questions.exact_counts)
        case "whole":
            return WholeQuestion()
        case "suite":
            from selma_ray.judging.suites import open_suite

            suite = run.recipe.questions.suite or ""
            return questions_of_suite(open_suite(suite), suite)
        case "written" if splits_judged(run.recipe):
            return _written(run).source()
        case "written":
            return KnownQuestions({}, "a run that judges none of its own prompts")


def write_questions(run: Run, splits: Sequence[Split] | None = None, report: Report | None = None) -> None:
    """Write the questions that a run's judged prompts lack, in one pass; nothing where its source needs none written."""
    if source_name(run.recipe) != "written":
        return
    from selma_ray.judging.writing.on_ray import write_missing

    wanted = splits_judged(run.recipe) if splits is None else splits
    if wanted:
        write_missing(_prompts(run, wanted), writer_of(run.recipe), _written(run), run.recipe.cluster, report)


@contextmanager
def questions_beside(run: Run, report: Report) -> Iterator[None]:
    """Write questions in a thread, beside whatever the block does, as soon as all prompts are kept; waits for them at the end."""
    if source_name(run.recipe) != "written" or not splits_judged(run.recipe):
        yield
        return
    failures: list[BaseException] = []
    latest = [Progress("questions", 0, 0, "the language model that writes questions is starting")]
    stopped = threading.Event()

    def write() -> None:
        while not _all_kept(run):
            if stopped.wait(_POLL_S):
                return
        try:
            write_questions(run, report=latest.append)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=write, name="write-questions", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    while thread.is_alive():  # not joined without end, so that an interrupt is taken
        report(latest[-1])
        time.sleep(0.5)
    if failures:
        raise failures[0]


def question_counts(run: Run) -> dict[str, Any] | None:
    """Return where the questions of the judged prompts come from, and how many have the one about the whole prompt alone, and why."""
    splits = splits_judged(run.recipe)
    if not splits:
        return None
    name, prompts = source_name(run.recipe), _prompts(run, splits)
    reasons = without_questions(_source(run), prompts)
    counts: dict[str, Any] = {"source": name, "prompts": len(prompts), "whole": reasons.total()}
    if name == "written":
        return counts | _written(run).counts(prompts)
    return counts | {"failures": dict(reasons.most_common(3))}


def _written(run: Run) -> WrittenQuestions:
    return WrittenQuestions(run.folder, writer_of(run.recipe))


def _prompts(run: Run, splits: Sequence[Split]) -> list[str]:
    return [
        row["prompt"]
        for skill in run.skill_names
        for row in read_prompts(run.folder, skill).to_pylist()
        if row["split"] in splits
    ]


def _all_kept(run: Run) -> bool:
    progress = read_prompt_progress(run.folder)
    if progress is not None:
        return progress.kept >= progress.wanted
    kept = sum(read_prompts(run.folder, skill).num_rows for skill in run.skill_names)
    return kept >= run.recipe.prompts.per_skill * len(run.skill_names)
