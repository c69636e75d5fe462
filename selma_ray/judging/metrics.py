"""Metrics of an image and its prompt, by name: what the command line, the service and reports call them.

    from a judge's answers to a prompt's questions (`metrics_of_answers` gives all of them from one pass)
        dsg, dsg_dpg, dsg_selma     DSG's scorers `official`, `dpg` and `selma`
        soft_dsg                    geometric mean of P(gold answer), of yes/no questions
        tifa                        share of questions whose choice is the gold answer
        soft_tifa_am, soft_tifa_gm  arithmetic and geometric mean of the gold answers' probabilities
    from a judge and the prompt alone
        vqascore                    P(yes) of "Does this figure show ...?"
    from a model of their own
        clipscore, pickscore, hpsv2, hpsv2.1, imagereward

Every value may be None, with a reason: an image or an answer that cannot be read is never scored 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from selma_ray.errors import JudgeError, named_line
from selma_ray.judging.answers import choice_of
from selma_ray.judging.dsg import SCORERS, mean_score
from selma_ray.judging.judges.asking import as_yes_or_no, ask_images, image_fault
from selma_ray.judging.judges.interface import Answer, Judge
from selma_ray.judging.questions import Question
from selma_ray.judging.scoring import answered
from selma_ray.judging.soft import gold_chance, soft_dsg, soft_tifa_am, soft_tifa_gm, vqascore_question
from selma_ray.models.batches import spare_others
from selma_ray.models.device import device_of

__all__ = [
    "ANSWER_METRICS",
    "METRICS",
    "MODEL_METRICS",
    "PROMPT_METRICS",
    "ImageMetric",
    "MetricScore",
    "metrics_of_answers",
    "open_metric",
]


@dataclass(frozen=True)
class MetricScore:
    """A metric's value for an image; None, with a reason, where there is none."""

    value: float | None
    reason: str | None = None


class ImageMetric(Protocol):
    """One metric, ready to score."""

    name: str
    """The metric with its model or judge, and their revisions."""

    def score(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Question]] | None = None,
    ) -> list[MetricScore]:
        """Return one score an image; a bad image is null and spares the others."""
        ...


_OfAnswers = Callable[[Sequence[Question], Sequence[Answer]], float | None]


def _dsg(scorer: str) -> _OfAnswers:
    def score(questions: Sequence[Question], answers: Sequence[Answer]) -> float | None:
        asked = [answered(each, answer.text) for each, answer in zip(questions, answers, strict=True)]
        return mean_score(SCORERS[scorer](asked))

    return score


def _gold_chances(questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
    """Return P of each gold answer as the judge's first word; of yes against no alone where a judge tells no more of them."""
    return [
        (answer.probabilities or {}).get(each.answer, gold_chance(each.answer, answer.p_yes))
        for each, answer in zip(questions, answers, strict=True)
    ]


ANSWER_METRICS: Mapping[str, _OfAnswers] = {
    "dsg": _dsg("official"),
    "dsg_dpg": _dsg("dpg"),
    "dsg_selma": _dsg("selma"),
    "soft_dsg": lambda questions, answers: soft_dsg(
        gold_chance(each.answer, answer.p_yes) for each, answer in zip(questions, answers, strict=True)
    ),
    "tifa": lambda questions, answers: mean_score(
        None if answer.text is None else float(answer.text == each.answer)
        for each, answer in zip(questions, answers, strict=True)
    ),
    "soft_tifa_am": lambda questions, answers: soft_tifa_am(_gold_chances(questions, answers)),
    "soft_tifa_gm": lambda questions, answers: soft_tifa_gm(_gold_chances(questions, answers)),
}
PROMPT_METRICS = ("vqascore",)
MODEL_METRICS = ("clipscore", "pickscore", "hpsv2", "hpsv2.1", "imagereward")
METRICS = (*ANSWER_METRICS, *PROMPT_METRICS, *MODEL_METRICS)


def metrics_of_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float | None]:
    """Return every metric of `ANSWER_METRICS` for one image from its answers."""
    read = _read(questions, answers)
    return {name: score(questions, read) for name, score in ANSWER_METRICS.items()}


def open_metric(
    name: str, judge: Judge | None = None, model: str | None = None, batch_size: int = 64, num_gpus: float = 0
) -> ImageMetric:
    """Return the metric of that name, with a judge where it needs one, or with its public model or another folder or hub name.

    A model of its own computes on CUDA where it has GPUs. Raises JudgeError for an unknown name, a judge that is missing and a model
    that cannot be opened, ConfigError where its GPUs are not there.
    """
    if name in MODEL_METRICS:
        return _ModelMetric(name, model, batch_size, num_gpus)
    if name not in METRICS:
        raise JudgeError(f"metric must be one of {', '.join(METRICS)}, got {name!r}; name one of them")
    if judge is None:
        raise JudgeError(f"metric {name} needs a judge, got none; open one")
    return _JudgedMetric(name, judge)


class _JudgedMetric:
    """A metric of a judge's answers."""

    def __init__(self, metric: str, judge: Judge) -> None:
        self._metric = metric
        self._judge = judge
        self.name = f"{metric}:{judge.name}"

    def score(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Question]] | None = None,
    ) -> list[MetricScore]:
        """Return one score an image; `questions` are needed but for vqascore."""
        if self._metric == "vqascore":
            questions = [(Question(1, "whole", vqascore_question(prompt)),) for prompt in prompts]
        if questions is None:
            raise JudgeError(f"metric {self._metric} needs the questions of each prompt, got none; give them")
        choices = [[each.choices for each in asked] for asked in questions]
        given = ask_images(self._judge, images, [[each.question for each in asked] for asked in questions], choices)
        return [self._of(asked, _read(asked, answers)) for asked, answers in zip(questions, given, strict=True)]

    def _of(self, questions: Sequence[Question], answers: Sequence[Answer]) -> MetricScore:
        if self._metric == "vqascore":
            (value,) = _gold_chances(questions, answers)
        else:
            value = ANSWER_METRICS[self._metric](questions, answers)
        if value is not None:
            return MetricScore(value)
        reasons = [answer.reason for answer in answers if answer.reason]
        return MetricScore(
            None, reasons[0] if reasons else "there is no probability" if answers else "there are no questions"
        )


class _PairScorer(Protocol):
    name: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]: ...


class _ModelMetric:
    """A metric with a model of its own."""

    def __init__(self, metric: str, model: str | None, batch_size: int, num_gpus: float) -> None:
        device = device_of(num_gpus, f"num_gpus of {metric}")
        if metric == "imagereward":
            from selma_ray.judging.preferences.image_reward import ImageRewardScorer

            self._scorer: _PairScorer = ImageRewardScorer(model, batch_size, device)
        else:
            from selma_ray.judging.preferences.clip import ClipScorer

            self._scorer = ClipScorer(metric, model, batch_size, device)
        self.name = self._scorer.name

    def score(
        self,
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Question]] | None = None,
    ) -> list[MetricScore]:
        """Return one score an image and its prompt."""
        faults = [image_fault(image) for image in images]
        rows = [
            (image, prompt) for image, prompt, fault in zip(images, prompts, faults, strict=True) if image and not fault
        ]
        scores = iter(spare_others(self._score_rows, rows))
        return [_metric_score(next(scores)) if fault is None else MetricScore(None, fault) for fault in faults]

    def _score_rows(self, rows: Sequence[tuple[Image.Image, str]]) -> list[float]:
        images, prompts = zip(*rows, strict=True)
        return self._scorer.score(images, prompts)


def _metric_score(score: float | Exception) -> MetricScore:
    return MetricScore(None, named_line(score)) if isinstance(score, Exception) else MetricScore(score)


def _read(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Answer]:
    """Return answers to yes/no questions as yes, no or null; those to questions with choices as the choices they name."""
    return [
        _spelled(answer, each.choices) if each.choices else as_yes_or_no(answer)
        for each, answer in zip(questions, answers, strict=True)
    ]


def _spelled(answer: Answer, choices: Sequence[str]) -> Answer:
    choice = None if answer.text is None else choice_of(answer.text, choices)
    return answer if choice is None else replace(answer, text=choice)
