"""Step caching for UNets (DeepCache, Ma et al. 2024, section 3.2): deep features change little from one step to the next.

Every `interval`-th step of a row runs the whole UNet and keeps what the last but one up block gave; the steps between run
the first down block and the last up block alone, upon those features. Each row counts its own steps, so that its image
depends neither on its batch nor on when it joined.

Shapes: N rows, C channels, H x W positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selma_ray.errors import ConfigError

__all__ = ["DeepFeatures", "RowMemory"]

Predict = Callable[[Sequence[int]], torch.Tensor]
"""Runs the UNet on the rows with these indices."""


@dataclass
class RowMemory:
    """What a row keeps from its last whole step, and how many steps it has taken since; 0 is due for a whole one."""

    features: torch.Tensor | None = None
    """1 x C x H x W."""
    age: int = 0


class DeepFeatures:
    """Lets the deep blocks of a UNet be skipped; raises ConfigError for a UNet of fewer than two up blocks."""

    def __init__(self, unet: Any, interval: int) -> None:
        if len(unet.up_blocks) < 2:
            raise ConfigError(
                f"cache_interval must be 1 for a UNet of {len(unet.up_blocks)} up block, got {interval}; it has no deep blocks"
            )
        self._interval = interval
        self._replayed_NCHW: torch.Tensor | None = None
        self._recorded_NCHW: torch.Tensor | None = None
        for block in unet.down_blocks[1:]:
            block.forward = self._skippable(block.forward, _residuals_of(block))
        unet.mid_block.forward = self._skippable(unet.mid_block.forward, None)
        for block in unet.up_blocks[:-2]:
            block.forward = self._skippable(block.forward, None)
        unet.up_blocks[-2].forward = self._recorded(unet.up_blocks[-2].forward)

    def predict(self, predict: Predict, memories: Sequence[RowMemory]) -> torch.Tensor:
        """Return the prediction of every row, from one call for whole steps and one for those between."""
        whole = [index for index, memory in enumerate(memories) if memory.age == 0]
        between = [index for index, memory in enumerate(memories) if memory.age > 0]
        parts = []
        if whole:
            parts.append(predict(whole))
            assert self._recorded_NCHW is not None
            for index, features_1CHW in zip(whole, self._recorded_NCHW.split(1), strict=True):
                memories[index].features = features_1CHW
        if between:
            kept = [memories[index].features for index in between]
            self._replayed_NCHW = torch.cat([features for features in kept if features is not None])
            try:
                parts.append(predict(between))
            finally:
                self._replayed_NCHW = None
        self._recorded_NCHW = None
        for memory in memories:
            memory.age = (memory.age + 1) % self._interval
        order = torch.tensor([*whole, *between]).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    def _skippable(self, forward: Callable[..., Any], num_residuals: int | None) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self._replayed_NCHW is None:
                return forward(hidden_states, *arguments, **options)
            # Nothing looks at the residuals: the up blocks that would are skipped too.
            return hidden_states if num_residuals is None else (hidden_states, (hidden_states,) * num_residuals)

        return run

    def _recorded(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*arguments: Any, **options: Any) -> torch.Tensor:
            if self._replayed_NCHW is not None:
                return self._replayed_NCHW
            self._recorded_NCHW = forward(*arguments, **options)
            return self._recorded_NCHW

        return run


def _residuals_of(block: Any) -> int:
    return len(block.resnets) + (block.downsamplers is not None)
