import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selma_ray.adapters.deltas import squared_singular_values
from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.errors import AdapterError
from selma_ray.merging.methods import (
    MEANS,
    METHODS,
    MergeOptions,
    average_deltas,
    average_factors,
    default_weight,
    released_scale,
    shares,
    svd,
)
from selma_ray.merging.report import MergeReport, inner_product, sign_conflicts
from tests.unit.adapters.random_factors import alike, assert_close, dense, exact_sum, factors, random_factors, several


class EvenInputs:
    """Inputs that say nothing of an expert: each as strong as any other."""

    off_diagonal = 0.9

    def grams(self, experts: Sequence[LoraFactors]) -> list[torch.Tensor]:
        return [torch.eye(expert.A_RI.shape[1]) for expert in experts]


EVEN: Any = EvenInputs()
WHOLE = MergeOptions(scale=1.0, rank=9, density=1.0, model_name="base", inputs=EVEN)
# Of one expert, or of copies at one over their number; the others change what they merge by definition.
IDENTITIES = [method for method in METHODS if method not in ("released_scale", "tsv_m", "iso_c")]
SUMS = ("sum_deltas", "search", "dare")  # as MEANS, they lose nothing


@settings(deadline=None)
@given(several, st.data())
def test_average_deltas_is_the_weighted_mean_of_deltas_of_any_ranks_and_scales(
    experts: Any, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(experts), max_size=len(experts)))
    mean = exact_sum(experts, weights) / sum(weights)
    assert_close(average_deltas(experts, weights, scale=1.5).delta(), 1.5 * mean)
    assert_close(average_deltas(experts, [3 * weight for weight in weights]).delta(), mean)


@settings(deadline=None)
@given(factors, st.floats(-3, 3), st.floats(-3, 3))
def test_the_mean_of_an_expert_and_itself_is_that_expert_at_any_weights(
    expert: Any, first: float, second: float
) -> None:
    assume(first + second > 0.1)
    for method in MEANS:
        assert_close(METHODS[method]([expert, expert], [first, second], WHOLE).delta(), dense(expert), 1e-4)


@pytest.mark.parametrize("method", MEANS)
def test_weights_without_a_sum_have_no_mean(method: Any) -> None:
    with pytest.raises(AdapterError, match=r"must have a sum above 0, got 0; use merging.method sum_deltas"):
        METHODS[method]([random_factors(0, 2, 1.0)] * 2, [1.0, -1.0], WHOLE)


def test_equal_shares_stay_as_they_are() -> None:
    for count in range(1, 20):
        assert shares([1 / count] * count) == [1 / count] * count


@settings(deadline=None)
@given(several, st.data())
def test_without_loss_every_linear_method_is_the_weighted_sum_or_mean(experts: Any, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(experts), max_size=len(experts)))
    for method in SUMS:
        assert_close(METHODS[method](experts, weights, WHOLE).delta(), exact_sum(experts, weights))
    for method in ("average_deltas", "svd"):
        assert_close(METHODS[method](experts, weights, WHOLE).delta(), exact_sum(experts, weights) / sum(weights))


@settings(deadline=None)
@given(factors)
@pytest.mark.parametrize("method", IDENTITIES)
def test_one_expert_is_the_identity(method: Any, expert: Any) -> None:
    assert_close(METHODS[method]([expert], [1.0], WHOLE).delta(), dense(expert))


@settings(deadline=None)
@given(factors, st.integers(2, 5))
@pytest.mark.parametrize("method", IDENTITIES)
def test_duplicates_are_the_identity_at_one_over_their_number(method: Any, expert: Any, count: int) -> None:
    assert_close(METHODS[method]([expert] * count, [1 / count] * count, WHOLE).delta(), dense(expert))


@settings(deadline=None)
@given(alike, st.randoms(use_true_random=False))
@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter(method: Any, experts: Any, random: Any) -> None:
    options = MergeOptions(scale=0.7, rank=3, density=0.6, seed=3, model_name="base", inputs=EVEN)
    weighed = [(expert, 0.1 + index) for index, expert in enumerate(experts)]
    shuffled = random.sample(weighed, len(weighed))
    merged, again = (METHODS[method](*map(list, zip(*order, strict=True)), options) for order in (weighed, shuffled))  # type: ignore[arg-type, call-arg]
    assert_close(again.delta(), merged.delta(), 1e-4)


@settings(deadline=None)
@given(several, st.floats(-2, 2))
@pytest.mark.parametrize("method", [method for method in METHODS if method != "average_factors"])
def test_the_scale_multiplies_the_merged_delta(method: Any, experts: Any, scale: float) -> None:
    once, scaled = (MergeOptions(factor, 4, 0.5, seed=1, model_name="base", inputs=EVEN) for factor in (1.0, scale))
    weights = [1.0] * len(experts)
    expected = scale * METHODS[method](experts, weights, once).delta()
    torch.testing.assert_close(METHODS[method](experts, weights, scaled).delta(), expected, rtol=1e-4, atol=1e-4)


def test_released_scale_divides_by_the_length_of_the_models_name() -> None:
    experts = [random_factors(seed, 2, 1.5) for seed in range(3)]
    for name, length in (("CompVis/stable-diffusion-v1-4", 29), ("stabilityai/stable-diffusion-xl-base-1.0", 40)):
        assert_close(released_scale(experts, name).delta(), exact_sum(experts, [1 / length] * 3))
        assert default_weight("released_scale", 3, name) == 1 / length


def test_default_weights_are_means_and_sums() -> None:
    assert default_weight("average_deltas", 4, "base") == default_weight("ties", 4, "base") == 0.25
    assert default_weight("sum_deltas", 4, "base") == 1.0


@settings(deadline=None)
@given(several, st.integers(1, 9))
def test_svd_is_the_best_approximation_of_its_rank(experts: Any, rank: int) -> None:
    weights = [1 / len(experts)] * len(experts)
    merged = svd(experts, weights, rank, scale=1.5)
    U, values, V = torch.linalg.svd(1.5 * exact_sum(experts, weights), full_matrices=False)
    best = (U[:, :rank] * values[:rank]) @ V[:rank]
    lost = (1.5 * exact_sum(experts, weights) - merged.delta().double()).square().sum()
    assert merged.rank <= rank
    assert float(lost) <= float(values[rank:].square().sum()) + 1e-8 * float(values.square().sum())
    gap = 1.0 if rank >= len(values) else float((values[rank - 1] - values[rank]) / values[0])
    if gap > 1e-3:
        assert_close(merged.delta(), best)


@settings(deadline=None)
@given(alike)
def test_average_factors_averages_each_factor_and_so_has_cross_terms(experts: Any) -> None:
    count = len(experts)
    merged = average_factors(experts, [1 / count] * count)
    A_RI = sum(expert.A_RI.double() for expert in experts) / count
    B_OR = sum(expert.B_OR.double() for expert in experts) / count
    assert merged.rank == experts[0].rank
    assert_close(merged.delta(), experts[0].scale * B_OR @ A_RI)


def test_average_factors_keeps_about_one_over_k_squared_of_experts_that_share_nothing() -> None:
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


def test_average_factors_refuses_mixed_ranks_and_scales() -> None:
    with pytest.raises(AdapterError, match="ranks 2 and 3"):
        average_factors([random_factors(0, 2, 1.0), random_factors(1, 3, 1.0)], [0.5, 0.5])
    with pytest.raises(AdapterError, match="scales 1 and 2"):
        average_factors([random_factors(0, 2, 1.0), random_factors(1, 2, 2.0)], [0.5, 0.5])


@settings(deadline=None)
@given(factors, factors)
def test_inner_product_equals_that_of_dense_deltas(one: Any, other: Any) -> None:
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
def test_singular_values_equal_those_of_the_dense_delta(experts: Any) -> None:
    merged = average_deltas(experts, [1.0] * len(experts))
    values = squared_singular_values(merged).sqrt()
    dense = torch.linalg.svdvals(merged.scale * merged.B_OR.double() @ merged.A_RI.double())
    count = min(len(values), len(dense))
    of_largest = 1e-6 * max(1.0, float(dense[0]))  # what a float32 factor leaves of a singular value that is 0
    torch.testing.assert_close(values[:count], dense[:count], rtol=1e-6, atol=of_largest)
    for rank in range(1, merged.rank + 1):
        report = MergeReport([str(index) for index in range(len(experts))], rank)
        report.add(experts, merged)
        kept = float(dense[:rank].square().sum() / dense.square().sum())
        assert abs(report.as_dict()["energy_kept"] - kept) < 1e-6


def test_svd_of_experts_that_nearly_coincide_loses_no_digits() -> None:
    one = random_factors(0, 3, 1.0)
    for distance in (0.0, 1e-9, 1e-6, 1e-3):
        noise = random_factors(1, 3, 1.0)
        near = LoraFactors("module", one.A_RI, one.B_OR + distance * noise.B_OR, 1.0)
        merged = svd([one, near], [0.5, 0.5], rank=3)
        assert_close(merged.delta(), exact_sum([one, near], [0.5, 0.5]), 1e-6)
        gram = merged.B_OR.double().T @ merged.B_OR.double()
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_sign_conflicts_are_the_entries_where_both_signs_meet() -> None:
    one, other = (random_factors(seed, 2, scale) for seed, scale in ((0, 1.0), (1, -2.0)))
    share, entries = sign_conflicts([one, other])
    assert entries == dense(one).numel()
    assert share == float((dense(one) * dense(other) < 0).double().mean())
    assert sign_conflicts([one, one])[0] == 0.0
    zero = LoraFactors("module", torch.zeros_like(one.A_RI), one.B_OR, 1.0)
    assert sign_conflicts([one, zero])[0] == 0.0
