"""The examples of one round: what its renderers encoded, with how good each image is within its group.

Shapes: N images, C latent channels, h x w latent pixels.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selma_ray.errors import TrainingError
from selma_ray.experts.drawing import PROMPT_PREFIX
from selma_ray.experts.nft_loss import group_rewards
from selma_ray.experts.rounds import Round, summary_of
from selma_ray.local_copies import local_copy
from selma_ray.models.conditions import stacked, trimmed

__all__ = ["REWARDS", "RoundExamples"]

REWARDS = "reward_N"
"""How good each image of a batch is within its group, in [0, 1]."""


class RoundExamples:
    """The images of a round that teach something, in the order of its prompts.

    Raises TrainingError where all groups have images of one score: nothing could be learnt from them.
    """

    def __init__(self, round_: Round, expert: str, spread_deviations: float) -> None:
        self._chunks: list[dict[str, torch.Tensor]] = []
        places: list[tuple[int, int, int]] = []
        groups: list[list[float]] = []
        for chunk in range(round_.plan.chunks_per_round):
            tensors, known = _read(round_.plan.folder.path(round_.examples(chunk)))
            self._chunks.append(tensors)
            of_chunk: dict[int, list[float]] = {}
            for row, (prompt, score) in enumerate(zip(known["prompts"], known["scores"], strict=True)):
                places.append((chunk, row, prompt))
                of_chunk.setdefault(prompt, []).append(score)
            groups += of_chunk.values()
        rewards = group_rewards(groups, spread_deviations)
        equal = sum(1 for group in rewards if all(reward is None for reward in group))
        flat = [reward for group in rewards for reward in group]
        self.summary = summary_of([score for group in groups for score in group], len(groups), equal)
        self._kept = [(place, reward) for place, reward in zip(places, flat, strict=True) if reward is not None]
        if not self._kept:
            raise TrainingError(
                f"round {round_.number} of expert {expert}: all {len(groups)} groups of images have one score each, so that nothing can be "
                "learnt from them; raise experts.nft.images_per_prompt, or take another experts.nft.judge or other questions"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the examples at `positions`, stacked by name, and their rewards."""
        rows = [self._row(*self._kept[position][0]) for position in positions]
        rewards_N = torch.tensor([self._kept[position][1] for position in positions])
        return {**trimmed(stacked(rows)), REWARDS: rewards_N}

    def without(self, batch: Mapping[str, torch.Tensor], dropped: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return `batch`, of which no caption can be dropped."""
        assert not dropped
        return dict(batch)

    def _row(self, chunk: int, row: int, prompt: int) -> dict[str, torch.Tensor]:
        places = {True: prompt, False: row}
        tensors = self._chunks[chunk].items()
        return {
            name.removeprefix(PROMPT_PREFIX): tensor[(place := places[name.startswith(PROMPT_PREFIX)]) : place + 1]
            for name, tensor in tensors
        }


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
    local = str(local_copy(path))
    try:
        with safe_open(local, framework="pt") as chunk:
            known = {name: json.loads(values) for name, values in chunk.metadata().items()}
        return load_file(local), known
    except Exception as error:
        raise TrainingError(
            f"{path} must hold a round's examples ({error}); delete the round's folder and run the same command again"
        ) from None
