"""Merges by singular vectors against their definitions on dense deltas in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.merging.interference import disjoint_mean, trimmed
from selma_ray.merging.methods import default_weight
from selma_ray.merging.spectral import core_space, iso_c, tsv_m
from tests.unit.adapters.random_factors import alike, assert_close, dense, exact_sum, random_factors, several


def whitened(vectors: Any) -> Any:
    """X (X^T X)^(-1/2), by the pseudo-inverse of a symmetric root."""
    values, basis = torch.linalg.eigh(vectors.T @ vectors)
    roots = torch.where(values > 1e-18 * values.max(), values.clamp_min(1e-300).rsqrt(), 0.0)
    return vectors @ (basis * roots) @ basis.T


def tsv_m_by_definition(experts: Any, weights: Any) -> Any:
    lefts, values, rights = [], [], []
    for expert, weight in zip(experts, weights, strict=True):
        left, sigma, right = torch.linalg.svd(dense(expert), full_matrices=False)
        kept = min(max(1, len(sigma) // len(experts)), expert.rank)
        lefts.append(left[:, :kept])
        values.append(weight * sigma[:kept])
        rights.append(right[:kept].T)
    return whitened(torch.cat(lefts, 1)) @ torch.diag(torch.cat(values)) @ whitened(torch.cat(rights, 1)).T


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_tsv_m_is_what_the_paper_defines(count: int, seed: int) -> None:
    experts = [random_factors(seed + index, 2 + index, 1.5, rows=24, columns=20) for index in range(count)]
    weights = [0.5 + index for index in range(count)]
    assert_close(tsv_m(experts, weights, scale=2.0).delta(), 2.0 * tsv_m_by_definition(experts, weights), 1e-5)


def test_tsv_m_keeps_experts_of_orthogonal_spaces_whole() -> None:
    one = random_factors(0, 2, 1.0, rows=24, columns=20)
    other = random_factors(1, 2, 1.0, rows=24, columns=20)
    for factor in (one.A_RI, one.B_OR.T):
        factor[:, 10:] = 0
    for factor in (other.A_RI, other.B_OR.T):
        factor[:, :10] = 0
    assert_close(tsv_m([one, other], [1.0, 1.0]).delta(), exact_sum([one, other], [1.0, 1.0]), 1e-5)
    assert default_weight("tsv_m", 2, "base") == 1.0


@settings(deadline=None, max_examples=30)
@given(several)
def test_iso_c_is_what_the_paper_defines(experts: Any) -> None:
    weights = [1 / len(experts)] * len(experts)
    left, values, right = torch.linalg.svd(exact_sum(experts, weights), full_matrices=False)
    count = int((values > 1e-10 * values[0]).sum())
    expected = 1.5 * values[:count].mean() * left[:, :count] @ right[:count]
    merged = iso_c(experts, weights, scale=1.5)
    if values[count - 1] > 1e-6 * values[0]:  # else the last direction is rounding's
        assert_close(merged.delta(), expected, 1e-4)
    flat = torch.linalg.svdvals(merged.delta().double())[:count]
    torch.testing.assert_close(flat, flat.mean().expand(count), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(several, st.sampled_from([0.3, 0.7, 1.0]))
def test_core_space_is_what_the_paper_defines(experts: Any, density: float) -> None:
    """The bases are those of dense decompositions; the cores are taken from the dense deltas."""
    weights = [1 / len(experts)] * len(experts)
    stacked_B = torch.cat([expert.scale * expert.B_OR.double() for expert in experts], dim=1)
    stacked_A = torch.cat([expert.A_RI.double() for expert in experts])
    left, left_values, _ = torch.linalg.svd(stacked_B, full_matrices=False)
    _, right_values, right = torch.linalg.svd(stacked_A, full_matrices=False)
    left = left[:, left_values > 1e-10 * left_values[0]]
    right = right[right_values > 1e-10 * right_values[0]].T
    cores = [left.T @ dense(expert) @ right for expert in experts]
    for core, expert in zip(cores, experts, strict=True):
        assert_close(left @ core @ right.T, dense(expert))  # nothing is lost on the way there
    merged = left @ disjoint_mean([trimmed(core, density) for core in cores], weights) @ right.T
    assert_close(core_space(experts, weights, density).delta(), merged)


@settings(deadline=None, max_examples=30)
@given(alike)
def test_core_space_without_trimming_or_conflict_is_the_mean(experts: Any) -> None:
    expert = experts[0]
    assert_close(core_space([expert] * 3, [1 / 3] * 3, 1.0).delta(), dense(expert))


@pytest.mark.parametrize("method", [tsv_m, iso_c])
def test_zero_deltas_merge_to_zero(method: Any) -> None:
    zero = random_factors(0, 2, 0.0)
    assert not method([zero, zero], [0.5, 0.5]).delta().any()
    assert not core_space([zero, zero], [0.5, 0.5], 0.5).delta().any()
