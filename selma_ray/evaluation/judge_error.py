"""How far a judge can be trusted, and what its errors do to the figures.

From answers with known truth come a reliability diagram and, for each category, the judge's two error rates. The figures are then
computed again and again, each time with rates drawn from what the known answers leave possible, with answers turned round as often
as those rates say, and with prompts resampled: the interval holds both kinds of uncertainty. Shapes: R draws.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selma_ray.evaluation.statistics import Floats, share, tails

__all__ = ["calibration_summary", "figures_with_judge_error", "judge_error_summary"]

Row = Mapping[str, Any]
Score = Callable[[Sequence[Row]], float | None]

_BINS = 10
_PRIOR = 0.5  # Jeffreys' prior of a rate


def calibration_summary(known: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy by category, the bins of a reliability diagram and the expected calibration error of `known` answers."""
    readable = [row for row in known if row["answer"] is not None]
    with_chance = [row for row in readable if row["p_yes"] is not None]
    bins = _reliability(with_chance)
    gaps = [row["count"] * abs(row["p_yes"] - row["share"]) for row in bins]
    categories = sorted({row["category"] for row in readable})
    return {
        "questions": len(known),
        "unreadable": len(known) - len(readable),
        "accuracy": _accuracy(readable),
        "categories": {name: _accuracy([row for row in readable if row["category"] == name]) for name in categories},
        "bins": bins,
        "calibration_error": sum(gaps) / len(with_chance) if with_chance else None,
    }


def judge_error_summary(
    answers: Mapping[str, Sequence[Row]], known: Sequence[Row], score: Score, base: str, draws: int, seed: int
) -> dict[str, Any]:
    """Return the calibration, and every model's figure (and difference to `base`) with an interval that holds the judge's errors."""
    figures = figures_with_judge_error(answers, known, score, draws, seed)
    differences = {name: each - figures[base] for name, each in figures.items() if base in figures and name != base}
    return {
        **calibration_summary(known),
        "draws": draws,
        "models": {name: _spread(each) for name, each in figures.items()},
        "differences": {name: _spread(each) for name, each in differences.items()},
    }


def figures_with_judge_error(
    answers: Mapping[str, Sequence[Row]], known: Sequence[Row], score: Score, draws: int, seed: int
) -> dict[str, Floats]:
    """Return {model: figures of R draws}; the same draw has the same prompts and error rates in every model.

    `answers` are the answer rows of each model, `score` scores the rows of one image. A figure is the mean over prompts of the mean
    over their images.
    """
    images = {model: _by_image(rows) for model, rows in answers.items()}
    prompts = sorted({prompt for of_model in images.values() for prompt, _ in of_model})
    rng = np.random.default_rng(seed)
    figures: dict[str, list[float]] = {model: [] for model in answers}
    tables = {model: _ModelAnswers(of_model, prompts, score) for model, of_model in images.items()}
    counts = _error_counts(known)
    for _ in range(draws):
        rates = {key: rng.beta(wrong + _PRIOR, total - wrong + _PRIOR) for key, (wrong, total) in counts.items()}
        drawn_P = rng.integers(len(prompts), size=len(prompts))
        for model, table in tables.items():
            figures[model].append(table.figure(rates, drawn_P, rng))
    return {model: np.array(values) for model, values in figures.items()}


class _ModelAnswers:
    """One model's images: their scores as answered, and scored again where answers are turned round."""

    def __init__(self, images: Mapping[tuple[str, int], list[Row]], prompts: Sequence[str], score: Score) -> None:
        self._images = list(images.values())
        self._score = score
        place = {prompt: number for number, prompt in enumerate(prompts)}
        self._prompt_N = np.array([place[prompt] for prompt, _ in images], int)
        self._scores_N = np.array([_or_nan(score(rows)) for rows in self._images])
        self._num_prompts = len(prompts)
        flat = [(number, row) for number, rows in enumerate(self._images) for row in rows if row["answer"] is not None]
        self._image_A = np.array([number for number, _ in flat], int)
        self._rows = [row for _, row in flat]
        self._keys_A = np.array([f"{row['category']} {row['answer'] == 'yes'}" for _, row in flat])
        said = {
            name: [row["answer"] == "yes" for row in self._rows if row["category"] == name] for name in self._categories
        }
        self._said_yes = {name: float(np.mean(yes)) for name, yes in said.items()}

    @property
    def _categories(self) -> set[str]:
        return {row["category"] for row in self._rows}

    def figure(
        self, rates: Mapping[tuple[str, bool], float], drawn_P: NDArray[np.int64], rng: np.random.Generator
    ) -> float:
        """Turn answers round as often as the rates say, score those images again, and average over the drawn prompts."""
        chances_A = np.zeros(len(self._rows))
        for category, said_yes in self._said_yes.items():
            wrong_yes, wrong_no = _wrong_given_answer(rates, category, said_yes)
            chances_A[self._keys_A == f"{category} True"] = wrong_yes
            chances_A[self._keys_A == f"{category} False"] = wrong_no
        turned = {id(self._rows[index]) for index in np.flatnonzero(rng.random(len(chances_A)) < chances_A)}
        scores_N = self._scores_N.copy()
        for number in {int(self._image_A[index]) for index, row in enumerate(self._rows) if id(row) in turned}:
            rows = [_turned(row) if id(row) in turned else row for row in self._images[number]]
            scores_N[number] = _or_nan(self._score(rows))
        there_N = ~np.isnan(scores_N)
        sums_P = np.bincount(self._prompt_N[there_N], scores_N[there_N], self._num_prompts)
        counts_P = np.bincount(self._prompt_N[there_N], minlength=self._num_prompts)
        drawn_P = drawn_P[counts_P[drawn_P] > 0]
        return float(np.mean(sums_P[drawn_P] / counts_P[drawn_P])) if len(drawn_P) else float("nan")


def _spread(figures_R: Floats) -> dict[str, Any] | None:
    """Return the mean and the 95% interval of draws, or None where there are none."""
    there_R = figures_R[~np.isnan(figures_R)]
    if len(there_R) == 0:
        return None
    return {"mean": float(there_R.mean()), "interval": [float(bound) for bound in np.quantile(there_R, tails())]}


def _wrong_given_answer(rates: Mapping[tuple[str, bool], float], category: str, said_yes: float) -> tuple[float, float]:
    """Return the chances that a yes and that a no is wrong, from the judge's error rates and its share of yes.

    The true share of yes follows from the answered one (Rogan and Gladen 1978), the chances by Bayes' rule.
    """
    missed, invented = (rates.get((category, truth), 0.0) for truth in (True, False))
    truly_yes = float(np.clip((said_yes - invented) / max(1e-9, 1 - missed - invented), 0, 1))
    wrong_yes = invented * (1 - truly_yes) / said_yes if said_yes > 0 else 0.0
    wrong_no = missed * truly_yes / (1 - said_yes) if said_yes < 1 else 0.0
    return min(1.0, wrong_yes), min(1.0, wrong_no)


def _error_counts(known: Sequence[Row]) -> dict[tuple[str, bool], tuple[int, int]]:
    """Return {(category, truth): (wrong answers, answers)}."""
    counts: dict[tuple[str, bool], tuple[int, int]] = {}
    for row in known:
        if row["answer"] is not None:
            key = (row["category"], bool(row["truth"]))
            wrong, total = counts.get(key, (0, 0))
            counts[key] = (wrong + ((row["answer"] == "yes") != row["truth"]), total + 1)
    return counts


def _reliability(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the bins that hold answers: their mean P(yes), and the share that truly is yes with its interval."""
    bins: dict[int, list[Row]] = {}
    for row in rows:
        bins.setdefault(min(int(row["p_yes"] * _BINS), _BINS - 1), []).append(row)
    diagram = []
    for _, inside in sorted(bins.items()):
        truly = share(sum(row["truth"] for row in inside), len(inside))
        assert truly is not None
        mean = sum(row["p_yes"] for row in inside) / len(inside)
        diagram.append({"p_yes": mean, "share": truly.mean, "interval": [truly.low, truly.high], "count": truly.count})
    return diagram


def _accuracy(rows: Sequence[Row]) -> dict[str, Any] | None:
    right = share(sum((row["answer"] == "yes") == row["truth"] for row in rows), len(rows))
    if right is None:
        return None
    return {"mean": right.mean, "interval": [right.low, right.high], "count": right.count}


def _by_image(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    images: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        images.setdefault((row["prompt_id"], row["seed"]), []).append(row)
    return images


def _turned(row: Row) -> dict[str, Any]:
    return {**row, "answer": "no" if row["answer"] == "yes" else "yes"}


def _or_nan(score: float | None) -> float:
    return float("nan") if score is None else score
