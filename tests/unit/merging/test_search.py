"""The search against functions whose best weights are known, stopped and gone on with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selma_ray.errors import AdapterError
from selma_ray.merging.config import SearchConfig
from selma_ray.merging.search import num_candidates, search_weights
from selma_ray.merging.weights import ALL, weights_of
from selma_ray.storage import RunFolder

SKILLS = ["common", "counting", "style"]
BEST = {"common": 0.1, "counting": 0.6, "style": 0.3}


class Bowl:
    """Scores by the distance from BEST in every group, and remembers what it was asked."""

    def __init__(self, fail_after: Any = None) -> None:
        self.asked: list[Any] = []
        self.fail_after = fail_after

    def __call__(self, candidates: Any) -> Iterator[Any]:
        for candidate in reversed(candidates):
            if self.fail_after is not None and len(self.asked) == self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(candidate.number)
            np.random.rand()  # the global generator is not the search's
            distances = [
                (weight - BEST[skill]) ** 2 for group in candidate.weights.values() for skill, weight in group.items()
            ]
            yield candidate.number, 1.0 - sum(distances)


def search(folder: Any, score: Any, groups: Any = (ALL,), key: str = "key", seed: int = 0, **settings: Any) -> Any:
    config = SearchConfig(**{"generations": 30, "candidates": 8, **settings})
    return search_weights(SKILLS, groups, config, seed, score, RunFolder(str(folder)), "search/merged", key)


def test_finds_the_best_weights_and_scale(tmp_path: Path) -> None:
    result = search(tmp_path, Bowl())
    assert result.weights[ALL] == pytest.approx(BEST, abs=0.02)
    assert len(result.candidates) == num_candidates(3, SearchConfig(generations=30)) == 1 + 3 + 30 * 8
    best = result.candidates[result.best]
    assert best.score == max(candidate.score for candidate in result.candidates) > 0.999


def test_finds_weights_for_each_group_of_blocks(tmp_path: Path) -> None:
    groups = ["down_blocks", "mid_block", "up_blocks"]
    result = search(tmp_path, Bowl(), groups, generations=35, candidates=10)
    for group in groups:
        assert result.weights[group] == pytest.approx(BEST, abs=0.1)


def test_the_plain_mean_and_each_expert_are_tried_first_and_of_equals_the_first_wins(tmp_path: Path) -> None:
    result = search(tmp_path, lambda candidates: ((each.number, 0.5) for each in candidates))
    assert result.best == 0
    assert result.weights == {ALL: dict.fromkeys(SKILLS, pytest.approx(1 / 3))}
    alone = [candidate.weights[ALL] for candidate in result.candidates[1:4]]
    assert alone == [{other: float(other == skill) for other in SKILLS} for skill in SKILLS]


def test_weights_stay_within_their_bounds(tmp_path: Path) -> None:
    result = search(tmp_path, Bowl(), step=2.0, largest=1.5)
    weights = [weight for each in result.candidates if each.round for weight in each.weights[ALL].values()]
    assert min(weights) >= 0
    assert max(weights) <= 1.5 / 3 + 1e-12


@pytest.mark.parametrize("fail_after", [0, 2, 5, 14])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, fail_after: int) -> None:
    whole = search(tmp_path / "whole", Bowl(), generations=3, candidates=4)
    stopped = Bowl(fail_after)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", stopped, generations=3, candidates=4)
    rest = Bowl()
    assert search(tmp_path / "stopped", rest, generations=3, candidates=4) == whole
    assert sorted(stopped.asked + rest.asked) == list(range(16)), "nothing is scored twice"
    again = Bowl()
    assert search(tmp_path / "stopped", again, generations=3, candidates=4) == whole
    assert again.asked == []


def test_another_seed_draws_others_and_another_key_keeps_nothing(tmp_path: Path) -> None:
    first = search(tmp_path, Bowl(), generations=2)
    assert search(tmp_path / "other", Bowl(), generations=2, seed=1).candidates[4:] != first.candidates[4:]
    again = Bowl()
    search(tmp_path, again, generations=2, key="another")
    assert len(again.asked) == 20


def test_a_record_that_does_not_continue_is_refused(tmp_path: Path) -> None:
    search(tmp_path, Bowl(), generations=1)
    path = tmp_path / "search" / "merged" / "search.json"
    record = json.loads(path.read_text())
    record["candidates"][3]["weights"][ALL]["style"] += 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(AdapterError, match=r"search.json: candidate 3 must have the weights .* delete the file"):
        search(tmp_path, Bowl(), generations=1)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"candidate 0 .* must be finite, got nan"):
        search(tmp_path, lambda candidates: ((each.number, float("nan")) for each in candidates))


def test_one_skill_is_a_search_of_its_scale(tmp_path: Path) -> None:
    config = SearchConfig(generations=15, candidates=4)

    def score(candidates: Any) -> Any:
        return ((each.number, -((each.weights[ALL]["style"] - 1.7) ** 2)) for each in candidates)

    result = search_weights(["style"], [ALL], config, 0, score, RunFolder(str(tmp_path)), "search", "key")
    assert result.weights[ALL]["style"] == pytest.approx(1.7, abs=0.05)


def test_weights_that_cover_no_module_are_named() -> None:
    weights = {"mid_block": BEST}
    assert weights_of("mid_block.attentions.0", weights, SKILLS) == [0.1, 0.6, 0.3]
    with pytest.raises(AdapterError, match=r"must cover up_blocks.0.to_q, they are for mid_block"):
        weights_of("up_blocks.0.to_q", weights, SKILLS)
