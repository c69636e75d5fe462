"""Where the questions about a caption come from: each source answers for a prompt, or says that it has no questions for it.

    grammar   the miniature's own grammar, for captions of its world
    suite     a file of prompts with questions
    written   what a language model has written about the run's prompts
    whole     VQAScore's one question about the whole prompt, for any prompt

All pickle, so that renderers and replicas can hold them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from selma_ray.errors import NoQuestionsError
from selma_ray.judging.questions import PromptWithQuestions, Question
from selma_ray.judging.soft import vqascore_question
from selma_ray.miniature import world

__all__ = [
    "WHOLE",
    "GrammarQuestions",
    "KnownQuestions",
    "OrWhole",
    "QuestionSource",
    "WholeQuestion",
    "grammar_questions",
    "questions_of_suite",
    "without_questions",
]

WHOLE = "whole prompt"
"""Category of VQAScore's question; an image that is asked nothing else scores P(yes)."""


class QuestionSource(Protocol):
    """A source of questions."""

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about a prompt, at least one; raises NoQuestionsError where the source has none."""
        ...


@dataclass(frozen=True)
class GrammarQuestions:
    """The questions that the miniature's grammar gives."""

    exact_counts: bool = False
    """Whether one object is asked to be exactly one where a caption says “a”."""

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about a caption; raises NoQuestionsError for one outside the miniature's grammar."""
        return grammar_questions(prompt, self.exact_counts)


class WholeQuestion:
    """VQAScore's one question about the whole prompt (Lin et al. 2024)."""

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the question."""
        return (Question(1, WHOLE, vqascore_question(prompt), (0,)),)


@dataclass(frozen=True)
class KnownQuestions:
    """Questions that are there already, by prompt: of a suite, or written before."""

    by_prompt: Mapping[str, tuple[Question, ...]]
    origin: str
    """Where they come from, in words for an error."""

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about a prompt; raises NoQuestionsError for one that is not among them."""
        questions = self.by_prompt.get(prompt)
        if not questions:
            raise NoQuestionsError(f"{self.origin} has no questions about {prompt[:80]!r}")
        return questions


@dataclass(frozen=True)
class OrWhole:
    """Another source, and the question about the whole prompt wherever that has none."""

    source: QuestionSource

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about any prompt."""
        try:
            return self.source.questions(prompt)
        except NoQuestionsError:
            return WholeQuestion().questions(prompt)


def grammar_questions(caption: str, exact_counts: bool = False) -> tuple[Question, ...]:
    """Return the questions about a caption of the miniature; raises CaptionError, a NoQuestionsError, for any other."""
    asked = world.questions_for(caption, exact_counts)
    return tuple(Question(each.id, each.category, each.question, each.parents) for each in asked)


def questions_of_suite(suite: Sequence[PromptWithQuestions], name: str) -> KnownQuestions:
    """Return the questions of a suite's prompts."""
    return KnownQuestions({prompt.prompt: prompt.questions for prompt in suite}, f"the suite {name}")


def without_questions(source: QuestionSource, prompts: Iterable[str]) -> Counter[str]:
    """Return how many prompts a source has no questions for, by the reason."""
    reasons = Counter[str]()
    for prompt in prompts:
        try:
            source.questions(prompt)
        except NoQuestionsError as error:
            reasons[str(error)] += 1
    return reasons
