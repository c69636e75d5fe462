"""Exponential moving average of an adapter's weights while it is trained: what is exported in the place of the last step's."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """diffusers' average of weights by name, in fp32: its decay rises to the asked one as (1 + step) / (10 + step)."""

    def __init__(self, decay: float, weights: Mapping[str, torch.Tensor]) -> None:
        self._names = list(weights)
        self._average = EMAModel(map(_as_parameter, weights.values()), decay=decay)

    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of another step in."""
        self._average.step([_as_parameter(weights[name]) for name in self._names])

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the averages by name, on the CPU."""
        averages = zip(self._names, self._average.shadow_params, strict=True)
        return {name: tensor.detach().cpu().clone() for name, tensor in averages}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        device = self._average.shadow_params[0].device
        self._average.load_state_dict(state)
        self._average.to(device=device)


def _as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """Return what diffusers averages: a tensor that needs no gradient is copied as it is."""
    return torch.nn.Parameter(tensor)
