"""From answers to figures: scores per prompt, by skill and by category, and the summary of an evaluation.

Shapes: P prompts of the suite, in its order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.dsg import SCORERS, Answered
from selma_ray.evaluation.questions import PromptWithQuestions
from selma_ray.evaluation.statistics import Figure, figure, paired_difference

__all__ = ["EvaluationSummary", "ModelScores", "images_scored", "model_scores", "summarise"]

BASE, MERGED = "base", "merged"


@dataclass(frozen=True)
class ModelScores:
    """What a model's images got, shape (P,): a sum of scores and a count, over all questions and by category."""

    sums: NDArray
    counts: NDArray
    category_sums: Mapping[str, NDArray]
    category_counts: Mapping[str, NDArray]
    images: int
    unreadable_answers: int


@dataclass(frozen=True)
class EvaluationSummary:
    """The figures of every model and the paired difference of merged and base."""

    models: dict[str, dict[str, Any]]
    difference: dict[str, Any] | None
    prompts: int
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values; scores are in [0, 1]."""
        return {"models": self.models, "difference": self.difference, "prompts": self.prompts, **self.details}


def images_scored(
    answers: Iterable[Mapping[str, Any]], scorer: str
) -> dict[tuple[str, int], list[tuple[Mapping[str, Any], float | None]]]:
    """Return {(prompt id, seed): [(answer row, its score or None)]} for the answer rows of one model."""
    by_image: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_image.setdefault((answer["prompt_id"], answer["seed"]), []).append(answer)
    score = SCORERS[scorer]
    return {
        image: list(
            zip(
                asked,
                score([Answered(row["question_id"], row["answer"], row["parents"]) for row in asked]),
                strict=True,
            )
        )
        for image, asked in by_image.items()
    }


def model_scores(
    answers: Iterable[Mapping[str, Any]], suite: Sequence[PromptWithQuestions], scorer: str
) -> ModelScores:
    """Score the answer rows of one model; several images of a prompt are averaged, an unreadable image is left out."""
    row_of = {prompt.id: row for row, prompt in enumerate(suite)}
    categories = sorted({question.category for prompt in suite for question in prompt.questions})
    totals = _Totals(np.zeros(len(suite)), np.zeros(len(suite)))
    by_category = {category: _Totals(np.zeros(len(suite)), np.zeros(len(suite))) for category in categories}
    unreadable = 0
    images = images_scored(answers, scorer)
    for (prompt_id, _), scored in images.items():
        row = row_of[prompt_id]
        readable = [(answer["category"], score) for answer, score in scored if score is not None]
        unreadable += len(scored) - len(readable)
        for category, score in readable:
            by_category[category].add(row, score, 1)
        if readable:
            total = sum(score for _, score in readable)
            if scorer == "selma":
                totals.add(row, total, len(readable))
            else:
                totals.add(row, total / len(readable), 1)
    if scorer != "selma":  # every prompt weighs the same, however many of its images could be read
        np.divide(totals.sums, totals.counts, out=totals.sums, where=totals.counts > 0)
        np.minimum(totals.counts, 1, out=totals.counts)
    return ModelScores(
        totals.sums,
        totals.counts,
        {category: each.sums for category, each in by_category.items()},
        {category: each.counts for category, each in by_category.items()},
        len(images),
        unreadable,
    )


@dataclass
class _Totals:
    sums: NDArray
    counts: NDArray

    def add(self, row: int, score: float, count: int) -> None:
        self.sums[row] += score
        self.counts[row] += count


def summarise(
    scores: Mapping[str, ModelScores],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
    details: Mapping[str, Any],
) -> EvaluationSummary:
    """Return the figures of all models, with intervals, and of merged against base, paired by prompt and seed."""
    skills = np.array([prompt.skill for prompt in suite])
    models = {name: _model_summary(each, skills, config, seed) for name, each in scores.items()}
    difference = None
    if BASE in scores and MERGED in scores:
        difference = _difference(scores[MERGED], scores[BASE], skills, config, seed)
    return EvaluationSummary(models, difference, len(suite), dict(details))


def _model_summary(scores: ModelScores, skills: NDArray, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    def of(sums_P: NDArray, counts_P: NDArray) -> Figure | None:
        return figure(sums_P, counts_P, config.bootstrap_resamples, seed)

    by_skill = {
        skill: of(*(part[skills == skill] for part in (scores.sums, scores.counts))) for skill in _ordered(skills)
    }
    by_category = {name: of(sums_P, scores.category_counts[name]) for name, sums_P in scores.category_sums.items()}
    overall = of(scores.sums, scores.counts)
    return {
        "dsg": overall.mean if overall else None,
        "interval": [overall.low, overall.high] if overall else None,
        "skills": {skill: each.mean if each else None for skill, each in by_skill.items()},
        "skill_intervals": {skill: [each.low, each.high] if each else None for skill, each in by_skill.items()},
        "categories": {name: _plain(each) for name, each in by_category.items()},
        "images": scores.images,
        "unreadable_answers": scores.unreadable_answers,
    }


def _difference(
    merged: ModelScores, base: ModelScores, skills: NDArray, config: EvaluationConfig, seed: int
) -> dict[str, Any] | None:
    def between(new: _Totals, old: _Totals) -> dict[str, Any] | None:
        paired = paired_difference(new.sums, new.counts, old.sums, old.counts, config.bootstrap_resamples, seed)
        return _plain(paired)

    def of_skill(scores: ModelScores, skill: str) -> _Totals:
        return _Totals(scores.sums[skills == skill], scores.counts[skills == skill])

    def of_category(scores: ModelScores, name: str) -> _Totals:
        return _Totals(scores.category_sums[name], scores.category_counts[name])

    overall = between(_Totals(merged.sums, merged.counts), _Totals(base.sums, base.counts))
    if overall is None:
        return None
    overall["skills"] = {skill: between(of_skill(merged, skill), of_skill(base, skill)) for skill in _ordered(skills)}
    overall["categories"] = {
        name: between(of_category(merged, name), of_category(base, name)) for name in merged.category_sums
    }
    return overall


def _plain(each: Any) -> dict[str, Any] | None:
    if each is None:
        return None
    values = dict(vars(each))
    return {"mean": values.pop("mean"), "interval": [values.pop("low"), values.pop("high")], **values}


def _ordered(skills: NDArray) -> list[str]:
    return list(dict.fromkeys(skills.tolist()))
