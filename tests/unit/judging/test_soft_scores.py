import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.judging.soft import geometric_mean, soft_dsg, soft_tifa_am, soft_tifa_gm, vqascore_question


def test_vqascore_asks_in_the_papers_words() -> None:
    assert vqascore_question("a cat") == 'Does this figure show "a cat"? Please answer yes or no.'
    assert vqascore_question("braces {} stay") == 'Does this figure show "braces {} stay"? Please answer yes or no.'


def test_means() -> None:
    assert soft_tifa_am([0.5, 1.0]) == 0.75
    assert soft_tifa_gm([0.25, 1.0]) == soft_dsg([0.25, 1.0]) == pytest.approx(0.5)
    assert soft_tifa_gm([0.0, 1.0]) == 0.0


def test_what_cannot_be_read_is_left_out_and_never_zero() -> None:
    assert soft_tifa_am([None, 0.5]) == soft_tifa_gm([0.5, None]) == 0.5
    assert soft_tifa_am([None]) is soft_tifa_gm([]) is soft_dsg([None]) is None


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_geometric_mean_lies_below_the_arithmetic_and_ignores_order(values: Any) -> None:
    mean = geometric_mean(values)
    assert mean == pytest.approx(math.prod(values) ** (1 / len(values)), rel=1e-9)
    assert min(values) * (1 - 1e-9) <= mean <= soft_tifa_am(values) * (1 + 1e-9)
    assert geometric_mean(values[::-1]) == pytest.approx(mean, rel=1e-12)
