"""TIFA (Hu et al. 2023, section 3): multiple-choice questions about an image, and the filter that questions pass."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from selma_ray.judging.answers import choice_of
from selma_ray.judging.dsg import mean_score
from selma_ray.judging.judges.interface import YES_OR_NO
from selma_ray.judging.numerals import numeral_of
from selma_ray.judging.questions import Question

__all__ = [
    "CaptionAnswerer",
    "ChoiceFinder",
    "TifaSummary",
    "choose",
    "filter_questions",
    "summarise_tifa",
    "tifa",
    "token_f1",
]

MIN_F1 = 0.6
"""A free-form answer must share more than this with the gold answer (question_filter.py)."""


class ChoiceFinder(Protocol):
    """Finds the nearest choice to an answer; `embedding.SentenceEmbedder` is one."""

    def nearest(self, text: str, candidates: Sequence[str]) -> str:
        """Return one of the candidates."""
        ...


class CaptionAnswerer(Protocol):
    """A question answering model that reads a caption in place of an image."""

    def choose(self, question: str, caption: str, choices: Sequence[str]) -> str:
        """Answer with one of the choices."""
        ...

    def answer(self, question: str, caption: str) -> str:
        """Answer in free words, lower case, without punctuation."""
        ...


def choose(answer: str | None, choices: Sequence[str], finder: ChoiceFinder) -> str | None:
    """Return the choice that a free-form answer stands for: itself, or the nearest; None for no answer."""
    if answer is None:
        return None
    named = choice_of(answer, choices)
    return finder.nearest(answer, choices) if named is None else named


def tifa(questions: Sequence[Question], answers: Sequence[str | None], finder: ChoiceFinder) -> list[float | None]:
    """Return 1.0 for each question whose choice is the gold answer, else 0.0; None where there is no answer."""
    chosen = [choose(answer, each.choices, finder) for each, answer in zip(questions, answers, strict=True)]
    return [
        None if choice is None else float(choice == each.answer) for each, choice in zip(questions, chosen, strict=True)
    ]


@dataclass(frozen=True)
class TifaSummary:
    """A benchmark's figures: the mean and the sample deviation over captions, and the mean over questions of each type."""

    average: float | None
    deviation: float | None
    by_type: dict[str, float]
    by_caption: dict[str, float]
    unanswered: int


def summarise_tifa(scored: Mapping[str, Iterable[tuple[str, float | None]]]) -> TifaSummary:
    """Summarise {caption: [(type of question, score)]}; questions without a score are left out and counted."""
    by_type: dict[str, list[float]] = {}
    by_caption: dict[str, float] = {}
    unanswered = 0
    for caption, questions in scored.items():
        kept = [(kind, score) for kind, score in questions if score is not None]
        unanswered += len(list(questions)) - len(kept)
        for kind, score in kept:
            by_type.setdefault(kind, []).append(score)
        mean = mean_score(score for _, score in kept)
        if mean is not None:
            by_caption[caption] = mean
    means = list(by_caption.values())
    return TifaSummary(
        mean_score(means),
        statistics.stdev(means) if len(means) > 1 else None,
        {kind: statistics.fmean(scores) for kind, scores in by_type.items()},
        by_caption,
        unanswered,
    )


def filter_questions(questions: Sequence[Question], caption: str, answerer: CaptionAnswerer) -> list[Question]:
    """Keep questions that a model answers rightly from the caption alone (question_filter.py).

    Of equal questions the first is tried. The model must choose the gold answer; where that is not yes or no, its free answer must
    share a token F1 above 0.6 with it, number words counting as numerals where the gold answer is a numeral.
    """
    seen: set[str] = set()
    kept = []
    for each in questions:
        if each.question in seen:
            continue
        seen.add(each.question)
        if choice_of(answerer.choose(each.question, caption, each.choices), each.choices) == each.answer and (
            each.answer.lower() in YES_OR_NO or _answered_freely(each, caption, answerer)
        ):
            kept.append(each)
    return kept


def token_f1(gold: str, predicted: str) -> float:
    """Return the F1 of white-space tokens; a token counts as often as it stands in its own text, as in the reference."""
    gold_tokens, predicted_tokens = gold.split(), predicted.split()
    if not gold_tokens:
        return float(not predicted_tokens)
    hits = sum(token in predicted_tokens for token in gold_tokens)
    misses = sum(token not in gold_tokens for token in predicted_tokens)
    if not hits:
        return 0.0
    precision, recall = hits / (hits + misses), hits / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def _answered_freely(question: Question, caption: str, answerer: CaptionAnswerer) -> bool:
    answer = answerer.answer(question.question, caption).strip()
    if question.answer.isnumeric():
        numeral = numeral_of(answer)
        answer = answer if numeral is None else str(numeral)
    return token_f1(question.answer.lower(), answer) > MIN_F1
