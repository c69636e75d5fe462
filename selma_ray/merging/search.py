"""Search of merge weights by CMA-ES (Hansen 2016, arXiv 1604.00772): weights and scale are searched together, from scores alone.

A weight is searched in units of 1/K, from 1: all ones is the plain mean, and the sum of an expert's weights is the scale. Who scores
candidates, on what and where, is the caller's: this module holds no model and no Ray.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from selma_ray.errors import AdapterError
from selma_ray.merging.config import SearchConfig
from selma_ray.merging.weights import Weights
from selma_ray.storage import RunFolder

if TYPE_CHECKING:
    import cma

__all__ = ["MergeCandidate", "ScoreCandidates", "SearchResult", "num_candidates", "search_weights"]

_RECORD = "search.json"


@dataclass(frozen=True)
class MergeCandidate:
    """Weights to try, with the score they got; `round` 0 is the plain mean and each expert alone."""

    number: int
    round: int
    weights: Weights
    score: float | None = None


ScoreCandidates = Callable[[Sequence[MergeCandidate]], Iterator[tuple[int, float]]]
"""Yields (number, score) of each candidate as it is known, in any order; more is better."""


@dataclass(frozen=True)
class SearchResult:
    """All candidates in order, and the number of the best: the highest score, of equals the first."""

    candidates: tuple[MergeCandidate, ...]
    best: int

    @property
    def weights(self) -> Weights:
        """Return the best weights."""
        return self.candidates[self.best].weights

    def as_dict(self) -> dict[str, Any]:
        """Return the search as plain values."""
        return {"best": self.best, "candidates": [asdict(candidate) for candidate in self.candidates]}


def search_weights(
    skills: Sequence[str],
    groups: Sequence[str],
    config: SearchConfig,
    seed: int,
    score: ScoreCandidates,
    folder: RunFolder,
    directory: str,
    key: str,
) -> SearchResult:
    """Return the weights of `skills` in each of `groups` that score best: no worse than the mean, no worse than one expert alone.

    Every score is recorded in `directory` as it comes, under `key`, which names all that scores depend on: a search that was stopped
    goes on and finds the same weights; a record of another key is deleted. Raises AdapterError for a record that does not continue.
    """
    record = _Record(folder, directory, key)
    strategy = _strategy(len(skills) * len(groups), config, seed)
    candidates: list[MergeCandidate] = []
    for number in range(config.generations + 1):
        points = strategy.ask() if number else _first_points(len(skills), len(groups))
        asked = [
            MergeCandidate(len(candidates) + index, number, _weights(point, groups, skills))
            for index, point in enumerate(points)
        ]
        scored = _scored(asked, score, record)
        if number:
            strategy.tell(points, [-_known(candidate) for candidate in scored])
        candidates += scored
    best = max(candidates, key=lambda candidate: (_known(candidate), -candidate.number))
    return SearchResult(tuple(candidates), best.number)


class _Record:
    """The scores of a search, in its folder."""

    def __init__(self, folder: RunFolder, directory: str, key: str) -> None:
        self._folder, self._path, self._key = folder, (directory, _RECORD), key
        self._rows: dict[int, dict[str, Any]] = {}
        if folder.exists(*self._path):
            before = folder.read_json(*self._path)
            if before["key"] == key:
                self._rows = {row["number"]: row for row in before["candidates"]}

    def score_of(self, candidate: MergeCandidate) -> float | None:
        row = self._rows.get(candidate.number)
        if row is None:
            return None
        if row["weights"] != candidate.weights:
            raise AdapterError(
                f"{self._folder.path(*self._path)}: candidate {candidate.number} must have the weights that this search draws, "
                "another version's are recorded; delete the file to search again"
            )
        return row["score"]

    def add(self, candidate: MergeCandidate) -> None:
        self._rows[candidate.number] = asdict(candidate)
        rows = [self._rows[number] for number in sorted(self._rows)]
        self._folder.write_json({"key": self._key, "candidates": rows}, *self._path)


def _scored(candidates: Sequence[MergeCandidate], score: ScoreCandidates, record: _Record) -> list[MergeCandidate]:
    known = {candidate.number: replace(candidate, score=record.score_of(candidate)) for candidate in candidates}
    pending = [candidate for candidate in known.values() if candidate.score is None]
    for number, value in score(pending) if pending else ():
        if not math.isfinite(value):
            raise AdapterError(f"the score of candidate {number} of the merge search must be finite, got {value}")
        known[number] = replace(known[number], score=float(value))
        record.add(known[number])
    return list(known.values())


def _known(candidate: MergeCandidate) -> float:
    assert candidate.score is not None, f"candidate {candidate.number} got no score"
    return candidate.score


def num_candidates(num_skills: int, config: SearchConfig) -> int:
    """Return how many candidates a search scores."""
    return len(_first_points(num_skills, 1)) + config.generations * config.candidates


def _first_points(num_skills: int, num_groups: int) -> list[np.ndarray]:
    """Return the plain mean and, of several experts, each alone."""
    alone = num_skills * np.eye(num_skills) if num_skills > 1 else np.empty((0, 1))
    return [np.tile(point, num_groups) for point in (np.ones(num_skills), *alone)]


def _weights(point: np.ndarray, groups: Sequence[str], skills: Sequence[str]) -> Weights:
    """Return a point of the search, in units of 1/K, as weights."""
    by_group = (point / len(skills)).reshape(len(groups), len(skills))
    return {group: dict(zip(skills, row.tolist(), strict=True)) for group, row in zip(groups, by_group, strict=True)}


def _strategy(dimensions: int, config: SearchConfig, seed: int) -> "cma.CMAEvolutionStrategy":
    import cma  # warns where matplotlib is missing, which no other merge needs to say

    draw = np.random.default_rng(seed)
    options = {
        "popsize": config.candidates,
        "bounds": [0, config.largest],
        # A generator of its own: cma would draw from numpy's global one, which whatever scores may draw from too.
        "seed": math.nan,
        "randn": lambda *shape: draw.standard_normal(shape),
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(np.ones(dimensions), config.step, options)
