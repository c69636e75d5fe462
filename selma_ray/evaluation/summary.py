"""From answers to figures: every metric of every model, by skill and by category, with intervals and paired tests.

Images of one prompt from several seeds are averaged first; between two models only prompts and seeds that both could be scored
on are compared. What could not be read is left out, counted and named. Shapes: P prompts of the suite, in its order.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.scores import images_scored
from selma_ray.evaluation.statistics import Difference, Figure, Floats, figure, holm, paired_difference
from selma_ray.judging.dsg import SCORERS
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.judging.soft import gold_chance, soft_dsg

__all__ = [
    "BASE",
    "MERGED",
    "EvaluationSummary",
    "ImageKey",
    "ModelScores",
    "model_scores",
    "prompt_totals",
    "score_table",
    "summarise",
]

BASE, MERGED = "base", "merged"
SOFT_DSG = "soft_dsg"

ImageKey = tuple[str, int]
"""A prompt's id and a seed: what names an image, whichever model rendered it."""
Measure = tuple[str, str]
"""("metric", name) or ("category", name)."""

_NAMED_FAILURES = 20


@dataclass(frozen=True)
class _Part:
    """What one image adds to a measure: a sum of scores and how many they are."""

    total: float
    count: int


@dataclass(frozen=True)
class ModelScores:
    """What a model's images got: {image: {measure: part}}, and what could not be read."""

    scorer: str
    images: dict[ImageKey, dict[Measure, _Part]]
    unreadable_answers: int
    unscored: dict[ImageKey, str]
    """The images without one readable answer, with the first reason given."""

    @property
    def any_scored(self) -> bool:
        """Tell whether one image at least could be scored."""
        return any(self.images.values())


@dataclass(frozen=True)
class EvaluationSummary:
    """The figures of every model, and the paired difference of each and base."""

    models: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    prompts: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def difference(self) -> dict[str, Any] | None:
        """Return merged minus base."""
        return self.differences.get(MERGED)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values; scores are in [0, 1]."""
        return {
            "models": self.models,
            "difference": self.difference,
            "differences": self.differences,
            "prompts": self.prompts,
            **self.details,
        }


def model_scores(answers: Iterable[Mapping[str, Any]], scorer: str) -> ModelScores:
    """Score the answer rows of one model under `scorer`, and under every other scorer that reads the same answers."""
    answers = list(answers)
    by_scorer = {name: images_scored(answers, name) for name in (SCORERS if scorer in SCORERS else [scorer])}
    images: dict[ImageKey, dict[Measure, _Part]] = {}
    unscored: dict[ImageKey, str] = {}
    unreadable = 0
    for key, scored in by_scorer[scorer].items():
        unreadable += sum(score is None for _, score in scored)
        parts = {("metric", name): _of_image(name, of_scorer[key]) for name, of_scorer in by_scorer.items()}
        parts[("metric", SOFT_DSG)] = _mean_part(
            soft_dsg(gold_chance(row.get("gold") or "yes", row.get("p_yes")) for row, _ in scored)
        )
        for category in {row["category"] for row, _ in scored}:
            parts[("category", category)] = _sum_part(score for row, score in scored if row["category"] == category)
        images[key] = {measure: part for measure, part in parts.items() if part.count}
        if all(score is None for _, score in scored):
            images[key] = {}
            unscored[key] = scored[0][0].get("reason") or "no answer could be read"
    return ModelScores(scorer, images, unreadable, unscored)


def summarise(
    scores: Mapping[str, ModelScores],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
    details: Mapping[str, Any],
) -> EvaluationSummary:
    """Return the figures of all models, with intervals, and of each against base, paired by prompt and seed."""
    tally = _Tally(suite, config.bootstrap_resamples, seed)
    models = {name: tally.model(each) for name, each in scores.items()}
    differences = {}
    if BASE in scores:
        others = {name: each for name, each in scores.items() if name != BASE}
        found = {name: tally.difference(each, scores[BASE]) for name, each in others.items()}
        differences = {name: each for name, each in found.items() if each is not None}
        _adjust(differences)
    return EvaluationSummary(models, differences, len(suite), dict(details))


def prompt_totals(
    scores: ModelScores, measure: Measure, rows: Mapping[str, int], images: Collection[ImageKey]
) -> tuple[Floats, Floats]:
    """Return a measure's sums and counts by prompt, each of shape (P,), over `images`.

    Where a measure averages over images, a prompt counts once, however many of its images could be read.
    """
    sums_P, counts_P = np.zeros(len(rows)), np.zeros(len(rows))
    for key in images:
        part = scores.images[key].get(measure)
        if part is not None:
            sums_P[rows[key[0]]] += part.total
            counts_P[rows[key[0]]] += part.count
    if measure[0] == "metric" and measure[1] != "selma":
        np.divide(sums_P, counts_P, out=sums_P, where=counts_P > 0)
        np.minimum(counts_P, 1, out=counts_P)
    return sums_P, counts_P


def score_table(model: str, scores: ModelScores, answers: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return one row per image: its prompt, its seed, and its score under every metric, null where it has none."""
    asked = {(row["prompt_id"], row["seed"]): row for row in answers}
    metrics = _metrics(scores)
    rows = []
    for key, parts in scores.images.items():
        of_image = {name: parts.get(("metric", name)) for name in metrics}
        row = {name: asked[key][name] for name in ("skill", "prompt_id", "prompt", "seed", "judge")}
        row |= {name: part.total / part.count if part else None for name, part in of_image.items()}
        rows.append({"model": model, **row, "reason": scores.unscored.get(key)})
    columns = ["model", "skill", "prompt_id", "prompt", "judge", "reason"]
    schema = pa.schema(
        [(name, pa.string()) for name in columns] + [("seed", pa.int64())] + [(name, pa.float64()) for name in metrics]
    )
    return pa.Table.from_pylist(rows, schema)


class _Tally:
    """The suite's order, skills and categories, and how figures are resampled."""

    def __init__(self, suite: Sequence[PromptWithQuestions], resamples: int, seed: int) -> None:
        self._row_of = {prompt.id: row for row, prompt in enumerate(suite)}
        self._skills_P = np.array([prompt.skill for prompt in suite])
        self._skills = list(dict.fromkeys(self._skills_P.tolist()))
        self._categories = sorted({question.category for prompt in suite for question in prompt.questions})
        self._resamples, self._seed = resamples, seed

    def model(self, scores: ModelScores) -> dict[str, Any]:
        """Return a model's figures as plain values."""
        main: Measure = ("metric", scores.scorer)

        def of(measure: Measure, where_P: NDArray[np.bool_] | slice = slice(None)) -> Figure | None:
            sums_P, counts_P = prompt_totals(scores, measure, self._row_of, scores.images)
            return figure(sums_P[where_P], counts_P[where_P], self._resamples, self._seed)

        overall = of(main)
        by_skill = {skill: of(main, self._skills_P == skill) for skill in self._skills}
        return {
            "dsg": overall.mean if overall else None,
            "interval": [overall.low, overall.high] if overall else None,
            "skills": {skill: each.mean if each else None for skill, each in by_skill.items()},
            "skill_intervals": {skill: [each.low, each.high] if each else None for skill, each in by_skill.items()},
            "categories": {name: _plain(of(("category", name))) for name in self._categories},
            "metrics": {name: _plain(of(("metric", name))) for name in _metrics(scores)},
            "seeds": self._by_seed(scores, main),
            "images": len(scores.images),
            "unreadable_answers": scores.unreadable_answers,
            "unscored": _unscored(scores),
        }

    def difference(self, scores: ModelScores, base: ModelScores) -> dict[str, Any] | None:
        """Return a model's figures minus base's, over the images that both were scored on."""
        main: Measure = ("metric", scores.scorer)

        def between(measure: Measure, where_P: NDArray[np.bool_] | slice = slice(None)) -> Difference | None:
            shared = [
                key for key, parts in scores.images.items() if measure in parts and measure in base.images.get(key, {})
            ]
            new, old = (prompt_totals(each, measure, self._row_of, shared) for each in (scores, base))
            return paired_difference(
                new[0][where_P], new[1][where_P], old[0][where_P], old[1][where_P], self._resamples, self._seed
            )

        overall = _plain(between(main))
        if overall is None:
            return None
        tables = {
            "skills": {skill: _plain(between(main, self._skills_P == skill)) for skill in self._skills},
            "categories": {name: _plain(between(("category", name))) for name in self._categories},
            "metrics": {name: _plain(between(("metric", name))) for name in _metrics(scores)},
        }
        _adjust(tables["skills"])
        _adjust(tables["categories"])
        return overall | tables

    def _by_seed(self, scores: ModelScores, measure: Measure) -> dict[str, Any]:
        """Return the figure over the first image of every prompt, over the second, and so on, and their deviation."""
        nth: dict[int, list[ImageKey]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for key in scores.images:
            nth[seen[key[0]]].append(key)
            seen[key[0]] += 1
        means = []
        for keys in nth.values():
            sums_P, counts_P = prompt_totals(scores, measure, self._row_of, keys)
            means.append(float(sums_P.sum() / counts_P.sum()) if counts_P.any() else None)
        there = [mean for mean in means if mean is not None]
        return {"means": means, "deviation": float(np.std(there, ddof=1)) if len(there) > 1 else None}


def _adjust(table: Mapping[str, dict[str, Any] | None]) -> None:
    """Add to each row of a table the p values that hold for the whole of it."""
    rows = [row for row in table.values() if row is not None]
    for p in ("p_sign", "p_bootstrap"):
        for row, adjusted in zip(rows, holm([row[p] for row in rows]), strict=True):
            row[f"{p}_holm"] = adjusted


def _metrics(scores: ModelScores) -> list[str]:
    """Return the names of all metrics, the main one first."""
    named = {name for parts in scores.images.values() for kind, name in parts if kind == "metric"}
    return sorted(named, key=lambda name: (name != scores.scorer, name))


def _of_image(scorer: str, scored: Sequence[tuple[Mapping[str, Any], float | None]]) -> _Part:
    part = _sum_part(score for _, score in scored)
    return part if scorer == "selma" or not part.count else _Part(part.total / part.count, 1)


def _sum_part(scores: Iterable[float | None]) -> _Part:
    readable = [score for score in scores if score is not None]
    return _Part(sum(readable), len(readable))


def _mean_part(score: float | None) -> _Part:
    return _Part(0.0, 0) if score is None else _Part(score, 1)


def _unscored(scores: ModelScores) -> dict[str, Any]:
    named = [
        {"prompt_id": prompt_id, "seed": seed, "reason": reason}
        for (prompt_id, seed), reason in scores.unscored.items()
    ]
    reasons = Counter(scores.unscored.values())
    return {"images": len(named), "reasons": dict(reasons.most_common()), "first": named[:_NAMED_FAILURES]}


def _plain(each: Figure | Difference | None) -> dict[str, Any] | None:
    if each is None:
        return None
    values = dict(vars(each))
    return {"mean": values.pop("mean"), "interval": [values.pop("low"), values.pop("high")], **values}
