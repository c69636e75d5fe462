"""Images judged and scored: the one path for offline evaluation and for the service, so that both give the same figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from selma_ray.judging.answers import choice_of
from selma_ray.judging.dsg import SCORERS, Answered, mean_score
from selma_ray.judging.judges.asking import as_yes_or_no, ask_images
from selma_ray.judging.judges.interface import Answer, Judge
from selma_ray.judging.questions import Question
from selma_ray.judging.sources import WHOLE, QuestionSource

__all__ = ["ImageScore", "ImageScorer", "ScoredQuestion", "answered", "score_answers", "score_images"]

_REASON_CHARS = 200


@dataclass(frozen=True)
class ScoredQuestion:
    """A question about an image and how it was answered; `answer` is None, with a `reason`, where it could not be read."""

    id: int
    question: str
    category: str
    parents: tuple[int, ...]
    answer: str | None
    p_yes: float | None
    reason: str | None
    counted: bool | None
    """Whether it counts: the gold answer, with the gold answers to what it depends on; None where the answer could not be read."""


@dataclass(frozen=True)
class ImageScore:
    """How well an image follows its prompt, in [0, 1]; None where no answer could be read."""

    score: float | None
    judge: str
    questions: tuple[ScoredQuestion, ...]


class ImageScorer:
    """Scores how well images follow their prompts: a judge that is asked a source's questions."""

    def __init__(self, judge: Judge, source: QuestionSource, scorer: str = "official") -> None:
        self._judge = judge
        self._source = source
        self._scorer = scorer

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """Return a score in [0, 1] for each image; None for one that could not be judged."""
        questions = [self._source.questions(prompt) for prompt in prompts]
        return [scored.score for scored in score_images(self._judge, images, questions, self._scorer)]


def score_images(
    judge: Judge,
    images: Sequence[Image.Image | None],
    questions: Sequence[Sequence[Question]],
    scorer: str = "official",
) -> list[ImageScore]:
    """Ask each image its questions and score the answers; an image that is None or unreadable is null and spares the others."""
    choices = [[each.choices for each in asked] for asked in questions]
    answers = ask_images(judge, images, [[each.question for each in asked] for asked in questions], choices)
    return [score_answers(judge.name, asked, given, scorer) for asked, given in zip(questions, answers, strict=True)]


def answered(question: Question, answer: str | None) -> Answered:
    """Return an answer as DSG's scorers take it: the gold answer counts as a yes, whatever it is."""
    if answer is not None:
        answer = "yes" if answer == question.answer else "no"
    return Answered(question.id, answer, question.parents)


def _as_choice(answer: Answer, choices: Sequence[str]) -> Answer:
    if answer.text is None:
        return answer
    choice = choice_of(answer.text, choices)
    if choice is not None:
        return replace(answer, text=choice)
    reason = f"the judge answered {answer.text[:_REASON_CHARS]!r}, none of the choices; set evaluation.judge.embedder"
    return Answer(None, answer.p_yes, reason, answer.probabilities)


def score_answers(
    judge: str, questions: Sequence[Question], answers: Sequence[Answer], scorer: str = "official"
) -> ImageScore:
    """Score what the judge of that name has answered about one image."""
    answers = [
        _as_choice(answer, each.choices) if each.choices else as_yes_or_no(answer)
        for each, answer in zip(questions, answers, strict=True)
    ]
    asked = [answered(each, answer.text) for each, answer in zip(questions, answers, strict=True)]
    scores = SCORERS[scorer](asked)
    scored = tuple(
        ScoredQuestion(
            each.id, each.question, each.category, each.parents, answer.text, answer.p_yes, answer.reason,
            None if score is None else score == 1.0,
        )
        for each, answer, score in zip(questions, answers, scores, strict=True)
    )  # fmt: skip
    if [each.category for each in questions] == [WHOLE]:
        return ImageScore(answers[0].p_yes, judge, scored)  # VQAScore is this probability
    return ImageScore(mean_score(scores), judge, scored)
