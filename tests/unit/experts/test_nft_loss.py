import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.experts.nft_loss import group_rewards, nft_loss
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from tests.tiny_models import save_tiny_stable_diffusion
from tests.unit.models.tiny_flow_models import save_tiny_sd3

SHAPE = (3, 4, 2, 2)


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old, target = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return old, target


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reward", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_optimum_for_one_sample_is_the_analytic_one(reward: float, beta: float) -> None:
    old, target = predictions()
    rewards = torch.full((3,), reward, dtype=torch.float64)
    prediction = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([prediction], max_iter=50, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = nft_loss(prediction, old, target, rewards, beta).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = old + (2 * reward - 1) * (target - old) / beta
    torch.testing.assert_close(prediction.detach(), optimum, atol=1e-4, rtol=1e-4)


def test_normalised_errors_pull_towards_good_and_away_from_bad_images() -> None:
    old, target = predictions()
    scale = torch.tensor([0.3, 1.0, 4.0])
    for rewards, sign in ((torch.ones(3), -1), (torch.zeros(3), 1)):
        prediction = old.clone().requires_grad_(True)
        nft_loss(prediction, old, target, rewards, 1.0, scale).sum().backward()
        assert prediction.grad is not None
        along = (prediction.grad * (target - old)).flatten(1).sum(1)
        assert (sign * along > 0).all()
    prediction = old.clone().requires_grad_(True)
    nft_loss(prediction, old, target, torch.full((3,), 0.5), 1.0, scale).sum().backward()
    torch.testing.assert_close(prediction.grad, torch.zeros_like(old))


def test_each_normalised_error_is_divided_by_its_own_mean_absolute_one() -> None:
    old, target = predictions()
    scale = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    error = (old - target) * scale[:, None, None, None]  # the prediction is the old one: v+ = v- = v_old
    expected = error.square().flatten(1).mean(1) / error.abs().flatten(1).mean(1)
    torch.testing.assert_close(
        nft_loss(old, old, target, torch.tensor([0.2, 0.5, 1.0]), 1.0, scale), expected.float(), check_dtype=False
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_good_image_at_beta_1_is_selma_s_loss_and_errors_of_x0_are_scaled(
    kind: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    if kind == "flow":
        save_tiny_sd3(tmp_path / "model", tiny_pipeline_dir)
    else:
        save_tiny_stable_diffusion(tmp_path / "model", kind)
    family = open_family(ModelConfig(name=str(tmp_path / "model")))
    denoiser = family.load_denoiser()
    shapes = family.example_shapes(64, 64)
    batch = {
        name: torch.rand((2, *shape), generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()
    }
    seeds = (5, 6)
    expected = family.errors(denoiser, batch, [torch.Generator().manual_seed(seed) for seed in seeds])
    noised = family.noised(batch, [torch.Generator().manual_seed(seed) for seed in seeds])
    prediction = family.predict(denoiser, noised)
    loss = nft_loss(prediction, torch.randn_like(prediction), noised.target, torch.ones(2), 1.0)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    clean = [_clean(kind, family, noised, each) for each in (prediction, noised.target)]
    difference = (prediction - noised.target).abs() * noised.clean_scale.view(-1, 1, 1, 1)
    torch.testing.assert_close((clean[0] - clean[1]).abs(), difference, rtol=1e-3, atol=1e-4)


def _clean(kind: str, family: Any, noised: Any, prediction: torch.Tensor) -> torch.Tensor:
    """Return the clean latents that a prediction stands for, by the textbook formulas."""
    if kind == "flow":
        return noised.noisy - (noised.timesteps / 1000)[:, None, None, None] * prediction
    signal = family.schedule.alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
    if kind == "epsilon":
        return (noised.noisy - (1 - signal).sqrt() * prediction) / signal.sqrt()
    return signal.sqrt() * noised.noisy - (1 - signal).sqrt() * prediction


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=6), min_size=1, max_size=6))
def test_rewards_rank_the_images_of_a_group(groups: list[list[float]]) -> None:
    for scores, rewards in zip(groups, group_rewards(groups), strict=True):
        if max(scores) - min(scores) < 1e-8:
            continue
        given_ = [reward for reward in rewards if reward is not None]
        assert len(given_) == len(scores)
        assert all(0 <= reward <= 1 for reward in given_)
        ranked = sorted(range(len(scores)), key=lambda place: scores[place])
        assert all(given_[a] <= given_[b] + 1e-9 for a, b in itertools.pairwise(ranked))


def test_rewards_are_the_formula_s() -> None:
    rewards = group_rewards([[1.0, 0.0, None], [0.5, 0.5], [0.25, 0.75]], spread_deviations=2)
    deviation = math.sqrt((2 * 0.5**2 + 2 * 0.25**2) / 6)
    expected = [0.5 + 0.5 * centred / (2 * deviation) for centred in (0.5, -0.5)]
    assert rewards[0][:2] == pytest.approx(expected)
    assert rewards[0][2] is None
    assert rewards[1] == [None, None]  # equal scores teach nothing
    assert group_rewards([[1.0, 0.0]], spread_deviations=0.5)[0] == [1.0, 0.0]  # clipped
