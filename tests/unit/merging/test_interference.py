from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.merging.interference import dare, disjoint_mean, knots, ties, trimmed
from tests.unit.adapters.random_factors import alike, assert_close, dense, exact_sum, random_factors, several


def ties_by_definition(deltas: Any, density: Any) -> Any:
    """TIES as its paper writes it (Yadav et al. 2023, algorithm 1), on one task vector each."""
    vectors = []
    for delta in deltas:
        flat = delta.numpy().ravel()
        keep = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
        vector = np.zeros_like(flat)
        vector[keep] = flat[keep]
        vectors.append(vector)
    merged = np.zeros_like(vectors[0])
    for entry in range(merged.size):
        values = [vector[entry] for vector in vectors]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [value for value in values if value * sign > 0]
        merged[entry] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return torch.from_numpy(merged.reshape(deltas[0].shape))


@settings(deadline=None, max_examples=30)
@given(several, st.floats(0.05, 1.0))
def test_ties_is_what_the_paper_defines(experts: Any, density: float) -> None:
    merged = ties(experts, [1 / len(experts)] * len(experts), density, scale=2.0)
    assert_close(merged.delta(), 2.0 * ties_by_definition([dense(expert) for expert in experts], density))


def test_ties_weighs_the_mean_of_those_that_agree() -> None:
    deltas = [torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3.0, 4.0, 0.0])]
    merged = disjoint_mean(deltas, [3.0, 1.0])
    torch.testing.assert_close(merged, torch.tensor([(3 * 1 + 3) / 4, 4.0, 2.0]))


def test_trimmed_keeps_the_largest() -> None:
    tensor = torch.tensor([0.1, -3.0, 2.0, -0.5, 0.0])
    torch.testing.assert_close(trimmed(tensor, 0.4), torch.tensor([0.0, -3.0, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(trimmed(tensor, 0.01), torch.tensor([0.0, -3.0, 0.0, 0.0, 0.0]))
    assert trimmed(tensor, 1.0) is tensor


def test_dare_drops_what_its_seed_says_and_keeps_the_mean() -> None:
    experts = [random_factors(seed, 3, 1.0, rows=60, columns=50) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    once = dare(experts, weights, 0.4, seed=0).delta()
    assert torch.equal(once, dare(experts, weights, 0.4, seed=0).delta())
    assert not torch.equal(once, dare(experts, weights, 0.4, seed=1).delta())
    alone = dare(experts[:1], [1.0], 0.4, seed=0).delta()
    kept = alone != 0
    assert 0.35 < float(kept.double().mean()) < 0.45
    assert_close(alone[kept], dense(experts[0])[kept] / 0.4)
    # Of 400 draws the standard error is sqrt(0.6 / 0.4 / 400) = 0.06 of an entry.
    drawn = sum(dare(experts, weights, 0.4, seed).delta().double() for seed in range(400)) / 400
    assert_close(drawn, exact_sum(experts, weights), 0.08)


def test_experts_of_one_shape_drop_different_entries() -> None:
    one, other = (random_factors(seed, 3, 1.0) for seed in range(2))
    dropped = [dare([expert], [1.0], 0.5, seed=0).delta() == 0 for expert in (one, other)]
    assert not torch.equal(*dropped)


def knots_by_definition(experts: Any, weights: Any, density: Any) -> Any:
    """KnOTS-TIES on dense deltas (Stoica et al. 2024): one SVD of all deltas side by side."""
    deltas = [dense(expert) for expert in experts]
    U, values, V = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    rank = int((values > 1e-10 * values[0]).sum())
    blocks = V[:rank].split(deltas[0].shape[1], dim=1)
    return (U[:, :rank] * values[:rank]) @ disjoint_mean([trimmed(block, density) for block in blocks], weights)


@settings(deadline=None, max_examples=30)
@given(several, st.sampled_from([0.3, 0.7, 1.0]))
def test_knots_through_factors_is_knots_on_dense_deltas(experts: Any, density: Any) -> None:
    weights = [1 / len(experts)] * len(experts)
    assert_close(knots(experts, weights, density).delta(), knots_by_definition(experts, weights, density))


@settings(deadline=None, max_examples=30)
@given(alike)
def test_knots_stays_in_the_columns_that_the_experts_span(experts: Any) -> None:
    merged = knots(experts, [1 / len(experts)] * len(experts), 0.5).delta().double()
    basis, values, _ = torch.linalg.svd(torch.cat([dense(expert) for expert in experts], dim=1), full_matrices=False)
    basis = basis[:, values > 1e-9 * values[0]]
    assert_close(basis @ (basis.T @ merged), merged)


@pytest.mark.parametrize("method", [ties, knots])
def test_zero_deltas_merge_to_zero(method: Any) -> None:
    zero = random_factors(0, 2, 0.0)
    assert not method([zero, zero], [0.5, 0.5], 0.5).delta().any()
    assert not dare([zero], [1.0], 0.5, seed=0).delta().any()
