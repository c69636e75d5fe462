import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.errors import AdapterError
from selma_ray.merging.adapters import LoraFactors
from selma_ray.merging.methods import average_deltas, average_factors
from selma_ray.merging.report import MergeReport, inner_product, singular_values

O, I = 12, 9  # noqa: E741


def random_factors(seed: int, rank: int, scale: float) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, I, generator=generator)
    return LoraFactors("module", A_RI, torch.randn(O, rank, generator=generator), scale)


factors = st.builds(
    random_factors, st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0, math.sqrt(8)])
)
alike = st.integers(1, 5).flatmap(
    lambda rank: st.lists(
        st.builds(random_factors, st.integers(0, 10_000), st.just(rank), st.just(2.0)), min_size=1, max_size=5
    )
)


def exact_mean(experts: list[LoraFactors], weights: list[float]) -> torch.Tensor:
    return sum(w * e.scale * e.B_OR.double() @ e.A_RI.double() for e, w in zip(experts, weights, strict=True))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error < 1e-5


@settings(deadline=None)
@given(st.lists(factors, min_size=1, max_size=5), st.data())
def test_average_deltas_is_the_weighted_sum_of_deltas_of_any_ranks_and_scales(experts, data):
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(experts), max_size=len(experts)))
    assert_close(average_deltas(experts, weights, scale=1.5).delta(), 1.5 * exact_mean(experts, weights))


@settings(deadline=None)
@given(factors)
def test_one_expert_is_the_identity(expert):
    assert_close(average_deltas([expert], [1.0]).delta(), expert.delta())
    assert_close(average_factors([expert], [1.0]).delta(), expert.delta())


@settings(deadline=None)
@given(factors, st.integers(2, 5))
def test_duplicates_are_the_identity_at_one_over_their_number(expert, count):
    for method in (average_deltas, average_factors):
        assert_close(method([expert] * count, [1 / count] * count).delta(), expert.delta())


@settings(deadline=None)
@given(alike, st.randoms(use_true_random=False))
def test_order_does_not_matter(experts, random):
    shuffled = random.sample(experts, len(experts))
    weights = [1 / len(experts)] * len(experts)
    for method in (average_deltas, average_factors):
        assert_close(method(shuffled, weights).delta(), method(experts, weights).delta())


@settings(deadline=None)
@given(alike)
def test_average_factors_averages_each_factor_and_so_has_cross_terms(experts):
    count = len(experts)
    merged = average_factors(experts, [1 / count] * count)
    A_RI = sum(expert.A_RI.double() for expert in experts) / count
    B_OR = sum(expert.B_OR.double() for expert in experts) / count
    assert merged.rank == experts[0].rank
    assert_close(merged.delta(), experts[0].scale * B_OR @ A_RI)


def test_average_factors_keeps_about_one_over_k_squared_of_experts_that_share_nothing():
    experts = [random_factors(seed, 2, 1.0) for seed in range(4)]
    disjoint = []
    for index, expert in enumerate(experts):
        A_RI, B_OR = torch.zeros_like(expert.A_RI), torch.zeros_like(expert.B_OR)
        A_RI[:, 2 * index : 2 * index + 2] = expert.A_RI[:, 2 * index : 2 * index + 2]
        B_OR[3 * index : 3 * index + 3] = expert.B_OR[3 * index : 3 * index + 3]
        disjoint.append(LoraFactors("module", A_RI, B_OR, 1.0))
    own = disjoint[1].delta()[3:6, 2:4]
    merged = average_factors(disjoint, [0.25] * 4).delta()[3:6, 2:4]
    torch.testing.assert_close(merged, own / 16)


def test_average_factors_refuses_mixed_ranks_and_scales():
    with pytest.raises(AdapterError, match="ranks 2 and 3"):
        average_factors([random_factors(0, 2, 1.0), random_factors(1, 3, 1.0)], [0.5, 0.5])
    with pytest.raises(AdapterError, match="scales 1 and 2"):
        average_factors([random_factors(0, 2, 1.0), random_factors(1, 2, 2.0)], [0.5, 0.5])


@settings(deadline=None)
@given(factors, factors)
def test_inner_product_equals_that_of_dense_deltas(one, other):
    dense = float(
        (
            one.scale
            * one.B_OR.double()
            @ one.A_RI.double()
            * (other.scale * other.B_OR.double() @ other.A_RI.double())
        ).sum()
    )
    assert math.isclose(inner_product(one, other), dense, rel_tol=1e-9, abs_tol=1e-9)


@settings(deadline=None)
@given(st.lists(factors, min_size=1, max_size=4))
def test_singular_values_equal_those_of_the_dense_delta(experts):
    merged = average_deltas(experts, [1.0] * len(experts))
    values = singular_values(merged)
    dense = torch.linalg.svdvals(merged.scale * merged.B_OR.double() @ merged.A_RI.double())
    count = min(len(values), len(dense))
    torch.testing.assert_close(values[:count], dense[:count], rtol=1e-6, atol=1e-6)
    for rank in range(1, merged.rank + 1):
        report = MergeReport([str(index) for index in range(len(experts))], rank)
        report.add(experts, merged)
        kept = float(dense[:rank].square().sum() / dense.square().sum())
        assert abs(report.as_dict()["energy_kept"] - kept) < 1e-6
