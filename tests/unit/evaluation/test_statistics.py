import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.evaluation.statistics import figure, holm, paired_difference, share, sign_test


def scores(count: int, chance: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < chance).astype(float)


def test_interval_agrees_with_the_normal_one_for_many_prompts() -> None:
    sums_P = scores(2000, 0.7)
    result = figure(sums_P, np.ones(2000), resamples=4000, seed=0)
    half = 1.96 * sums_P.std() / math.sqrt(2000)
    assert result.mean == sums_P.mean()
    # 4,000 resamples place a 2.5% quantile within about 0.05 of the half width (seen: 0.02).
    assert result.low == pytest.approx(result.mean - half, abs=0.1 * half)
    assert result.high == pytest.approx(result.mean + half, abs=0.1 * half)


def test_counts_weigh_prompts() -> None:
    result = figure(np.array([3.0, 0.0]), np.array([3.0, 1.0]), resamples=500, seed=0)
    assert (result.mean, result.count) == (0.75, 4)
    assert (result.low, result.high) == (0.0, 1.0)


def test_prompts_without_a_readable_image_are_left_out() -> None:
    with_gap = figure(np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 1.0]), resamples=500, seed=3)
    assert with_gap == figure(np.array([1.0, 0.0]), np.array([1.0, 1.0]), resamples=500, seed=3)
    assert figure(np.zeros(2), np.zeros(2), resamples=100, seed=0) is None


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    sums_P, ones_P = scores(50, 0.5), np.ones(50)
    assert figure(sums_P, ones_P, 300, seed=1) == figure(sums_P, ones_P, 300, seed=1)
    assert figure(np.arange(50.0), ones_P, 300, seed=1) != figure(np.arange(50.0), ones_P, 300, seed=2)  # type: ignore[arg-type]


def test_resampling_in_parts_draws_every_resample() -> None:
    num_prompts = 1 << 20  # four resamples at once
    result = figure(np.full(num_prompts, 0.25), np.ones(num_prompts), resamples=9, seed=0)
    assert (result.low, result.high) == (0.25, 0.25)


def test_pairing_cancels_what_prompts_share() -> None:
    base_P = scores(400, 0.5)
    merged_P = np.minimum(base_P + scores(400, 0.1, seed=1), 1.0)
    ones_P = np.ones(400)
    difference = paired_difference(merged_P, ones_P, base_P, ones_P, resamples=2000, seed=0)
    assert difference.mean == pytest.approx((merged_P - base_P).mean())
    assert 0 < difference.low < difference.mean < difference.high
    assert (difference.losses, difference.wins + difference.ties) == (0, 400)
    unpaired = figure(base_P, ones_P, 2000, seed=0)
    assert difference.high - difference.low < 0.7 * (unpaired.high - unpaired.low)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_model_does_not_differ_from_itself(values: Any) -> None:
    sums_P, ones_P = np.array(values), np.ones(len(values))
    difference = paired_difference(sums_P, ones_P, sums_P, ones_P, resamples=100, seed=0)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert (difference.p_sign, difference.p_bootstrap) == (1, 1)


def test_sign_test_is_the_exact_binomial_one() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(3, 3) == 1
    assert 0 < sign_test(700, 300) < 1e-30


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_a_difference_turns_round_with_its_models(pairs: Any) -> None:
    first_P, second_P = np.array(pairs).T
    ones_P = np.ones(len(pairs))
    there = paired_difference(first_P, ones_P, second_P, ones_P, resamples=99, seed=0)
    back = paired_difference(second_P, ones_P, first_P, ones_P, resamples=99, seed=0)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)
    assert (there.wins, there.losses, there.ties) == (back.losses, back.wins, back.ties)
    assert (there.p_sign, there.p_bootstrap) == (back.p_sign, back.p_bootstrap)
    assert there.wins + there.losses + there.ties == len(pairs)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=30))
def test_an_interval_lies_within_the_scores_and_ignores_their_unit(scored: Any) -> None:
    means_P, counts_P = (np.array(column, float) for column in zip(*scored, strict=True))
    result = figure(means_P * counts_P, counts_P, resamples=100, seed=0)
    assert means_P.min() - 1e-9 <= result.low <= result.high <= means_P.max() + 1e-9
    halved = figure(means_P * counts_P / 2, counts_P, resamples=100, seed=0)
    assert (2 * halved.mean, 2 * halved.low, 2 * halved.high) == pytest.approx(
        (result.mean, result.low, result.high), abs=1e-12
    )


def test_both_tests_hold_their_level_without_a_difference() -> None:
    rng = np.random.default_rng(0)
    ones_P = np.ones(60)
    rejections = {"p_sign": 0, "p_bootstrap": 0}
    for _ in range(300):
        difference = paired_difference(rng.random(60), ones_P, rng.random(60), ones_P, resamples=400, seed=0)
        for name in rejections:
            rejections[name] += getattr(difference, name) < 0.05
    # 5% of 300 is 15; three standard deviations above it is 26 (seen: 9 and 12).
    assert all(count <= 26 for count in rejections.values())


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_each_p_and_bonferroni_and_keeps_their_order(p_values: Any) -> None:
    adjusted = holm(p_values)
    for p, each in zip(p_values, adjusted, strict=True):
        assert p <= each <= min(1, len(p_values) * p)
    by_p = [each for _, each in sorted(zip(p_values, adjusted, strict=True))]
    assert by_p == sorted(by_p)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_share_lies_in_its_interval(successes: int, failures: int) -> None:
    result = share(successes, successes + failures)
    if result is None:
        assert successes + failures == 0
        return
    assert 0 <= result.low <= result.mean <= result.high <= 1
    mirrored = share(failures, successes + failures)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - result.high, 1 - result.low), abs=1e-9)


def test_a_share_by_the_rule_of_three() -> None:
    # Without a success in n trials the upper bound is 1 - 0.025 ** (1 / n).
    assert share(0, 30).high == pytest.approx(1 - 0.025 ** (1 / 30))
