"""DiffusionNFT (Zheng et al. 2025, 2509.16117): towards good images of a prompt and away from bad ones. Knows no model and no Ray.

All predictions are a model's own (epsilon, v or velocity), which are linear in the clean latents x0: the paper's errors of x0 are these
errors times c(t), `Noised.clean_scale`.

Shapes: N images, C latent channels, h x w latent pixels.
"""

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["group_rewards", "nft_loss"]

_SMALLEST_ERROR = 1e-5  # below which no squared error is divided by its mean absolute one


def group_rewards(groups: Sequence[Sequence[float | None]], spread_deviations: float = 2.0) -> list[list[float | None]]:
    """Return r in [0, 1] of each image: how good it is within its group of one prompt, 0.5 being its group's mean.

    r = 0.5 + 0.5 clip((score - mean of the group) / Z, -1, 1), where Z is `spread_deviations` times the deviation of all centred scores. An
    image without a score has no r, and neither have those of a group whose scores are all equal: it teaches nothing.
    """
    centred = [_centred(group) for group in groups]
    values = [value for group in centred for value in group if value is not None]
    deviation = math.sqrt(math.fsum(value * value for value in values) / max(1, len(values)))
    scale = spread_deviations * deviation
    return [
        [None if value is None or not _has_spread(group) else 0.5 + 0.5 * max(-1.0, min(1.0, value / scale)) for value in group]
        for group in centred
    ]  # fmt: skip


def nft_loss(
    prediction_NChw: Any,
    old_prediction_NChw: Any,
    target_NChw: Any,
    rewards_N: Any,
    beta: float,
    clean_scale_N: Any | None = None,
) -> Any:
    """Return each image's loss (N): r |x0(v+) - x0|^2 + (1 - r) |x0(v-) - x0|^2, over beta.

    v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v. With `clean_scale_N` each squared error of x0 is divided by its own
    mean absolute error, as published; without it the errors are those of the prediction, as they are, and r = 1, beta = 1 is denoising.
    """
    prediction, old = prediction_NChw.float(), old_prediction_NChw.float()
    towards_NChw = (1 - beta) * old + beta * prediction - target_NChw
    away_NChw = (1 + beta) * old - beta * prediction - target_NChw
    good_N, bad_N = (_squared(error_NChw, clean_scale_N) for error_NChw in (towards_NChw, away_NChw))
    return (rewards_N * good_N + (1 - rewards_N) * bad_N) / beta


def _squared(error_NChw: Any, clean_scale_N: Any | None) -> Any:
    if clean_scale_N is None:
        return error_NChw.square().flatten(1).mean(1)
    clean_NChw = error_NChw * clean_scale_N.view(-1, 1, 1, 1)
    mean_absolute_N = clean_NChw.detach().abs().flatten(1).mean(1).clamp_min(_SMALLEST_ERROR)
    return clean_NChw.square().flatten(1).mean(1) / mean_absolute_N


def _centred(group: Sequence[float | None]) -> list[float | None]:
    scores = [score for score in group if score is not None]
    mean = math.fsum(scores) / max(1, len(scores))
    return [None if score is None else score - mean for score in group]


def _has_spread(centred: Sequence[float | None]) -> bool:
    values = [value for value in centred if value is not None]
    return len(values) > 1 and max(values) - min(values) > 1e-9
