"""Fitting to preferences, Diffusion-DPO (Wallace et al. 2023, 2311.12908): pairs of images of one prompt, and the loss over them.

Shapes: N pairs; 2N images, the chosen ones first.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

__all__ = ["preference_loss", "preference_pairs"]


def preference_pairs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (chosen, rejected) ids, one pair for each prompt: the best of its images against the worst, by the judge's score.

    Takes columns id, skill, prompt, split, error and score of rendered rows. A prompt whose images score the same, or none of whose
    images was chosen for training, has no pair; among equals the first id wins.
    """
    scored = (row for row in rows if row["error"] is None and row["score"] is not None)
    by_prompt = groupby(sorted(scored, key=itemgetter("prompt", "id")), key=itemgetter("prompt"))
    pairs = []
    for _, group in by_prompt:
        images = list(group)
        chosen = max((row for row in images if row["split"] == "train"), key=itemgetter("score"), default=None)
        rejected = min(images, key=itemgetter("score"))
        if chosen is not None and chosen["score"] > rejected["score"]:
            pairs.append((chosen["id"], rejected["id"]))
    return pairs


def preference_loss(errors_2N: Any, base_errors_2N: Any, beta: float) -> tuple[Any, Any]:
    """Return the loss, and the share of pairs whose chosen image the fitted denoiser prefers (scalars).

    -log sigmoid(beta / 2 * (gain of the chosen - gain of the rejected)), an image's gain being by how much the fitted denoiser's mean
    squared error is below the base's: equation 14, its constants T and omega within beta, as in the authors' code.
    """
    from torch.nn.functional import logsigmoid

    chosen_N, rejected_N = (base_errors_2N - errors_2N).chunk(2)
    margins_N = chosen_N - rejected_N
    return -logsigmoid(beta / 2 * margins_N).mean(), (margins_N > 0).float().mean()
