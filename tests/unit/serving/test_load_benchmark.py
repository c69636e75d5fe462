"""The load that benchmarks.serving puts on a service, on an API that answers at once."""

import math
from typing import Any

import pytest

from benchmarks.serving_parts.kinds import KINDS, PAIRS, cost_of_kinds
from benchmarks.serving_parts.load import Answer, beside, closed_loop, latency_alone, open_loop, percentile, summary
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import queue_full
from selma_ray.serving.served import ModelNames
from tests.local_service import served
from tests.unit.serving.recorder import Recorder

BODY = {"prompt": "a cat"}


def url_of(address: str) -> str:
    return f"{address}/v1/images/generations"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, percent) for percent in (0, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([3.0], 99) == 3
    assert math.isnan(percentile([], 50))


def test_requests_arrive_at_the_rate_that_is_asked_for_whatever_is_answered(backend: Recorder) -> None:
    with served(build_app(backend, ServingConfig(), ModelNames("merged"), ())) as address:
        answers = open_loop(url_of(address), lambda number: (f"kind {number % 2}", BODY), rate=60, seconds=2, seed=0)
        again = open_loop(url_of(address), lambda number: ("kind", BODY), rate=60, seconds=2, seed=0)
        assert len(answers) == len(again) == pytest.approx(120, abs=35), "a Poisson process of its seed"
        assert {answer.status for answer in answers} == {200}
        assert {answer.kind for answer in answers} == {"kind 0", "kind 1"}
        assert all(0 < answer.seconds < 30 for answer in answers)
        assert max(answer.ended_s for answer in answers) > 1.5
        backend.error = queue_full(1)
        refused = open_loop(url_of(address), lambda number: ("kind", BODY), rate=20, seconds=0.5, seed=0)
        assert {answer.status for answer in refused} == {429}


def test_closed_loops_and_latencies(backend: Recorder) -> None:
    with served(build_app(backend, ServingConfig(), ModelNames("merged"), ())) as address:
        assert closed_loop(url_of(address), [BODY] * 7, clients=3) > 0
        assert len(backend.requests) == 7
        assert latency_alone(url_of(address), BODY, 3) > 0
        assert beside(url_of(address), BODY, BODY, others=2, calls=3) > 0


def test_a_level_says_what_users_get() -> None:
    drawn = [Answer("small", 200, 1.0, float(end)) for end in range(1, 9)] + [Answer("large", 200, 4.0, 10.0)]
    level = summary([*drawn, Answer("small", 429, 0.01, 1.0)], 1.1, 2.0, {"small": 0.5, "large": 4.0}, "small", "large")
    assert (level.p50_s, level.p95_s, level.offered) == (1, 4, 1.1)
    assert level.goodput == pytest.approx(9 / 10 / 2)
    assert level.refused == pytest.approx(0.1)
    assert level.unfairness == pytest.approx(2), "small ones took twice as long as alone, large ones as long"


def test_kinds_take_turns_and_pairs_are_set_against_their_halves() -> None:
    costs = {1.0: 1.0, 2.0: 2.0}

    def draw(bodies: Any) -> float:
        return sum(costs[body["guidance_scale"]] for body in bodies)

    rates, shares = cost_of_kinds(draw, BODY, count=4, rounds=2)
    assert (rates["unguided"], rates["guided"]) == (1, 0.5)
    assert set(rates) == set(KINDS)
    assert shares == {f"{one} and {other}": pytest.approx(1) for one, other in PAIRS}
