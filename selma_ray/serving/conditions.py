"""What every text-to-image family is to the engine: encode texts, predict one step for any mix of rows, decode latents.

Shapes: N rows or images, L tokens, D features of a token, C channels, H x W positions.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from PIL import Image

from selma_ray.adapters.mixing import Mix
from selma_ray.serving.caching import RowMemory
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.schedulers import Course

__all__ = ["Condition", "Conditions", "Denoiser", "Texts", "for_request"]

_REMEMBERED = 64  # of FLUX a text takes 4 MB


@dataclass(frozen=True)
class Condition:
    """What one row of the denoiser's batch is told about the image."""

    text: torch.Tensor
    """The embedded text, 1 x L x D."""
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The family's other inputs by their names in diffusers, such as the pooled text, each 1 x ..."""
    mix: Mix = ()
    """Experts that take part in this row."""
    memory: RowMemory = field(default_factory=RowMemory)
    """What step caching keeps of this row."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of one request; `negative` is None where no guidance is asked for."""

    positive: Condition
    negative: Condition | None


class Denoiser(Protocol):
    """A text-to-image model, taken apart so that the rows of a step may stand at different timesteps."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Embed the texts of each request."""
        ...

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request."""
        ...

    def predict(
        self, inputs_NCHW: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the model's prediction for each row."""
        ...

    def decode(self, latents_NCHW: torch.Tensor) -> list[Image.Image]:
        """Turn finished latents into RGB images."""
        ...


class Texts:
    """Embedded texts; those seen lately are remembered, so that a prompt that is drawn again is not embedded again."""

    def __init__(self, embed: Callable[[list[str]], list[Condition]]) -> None:
        self._embed = embed
        self._known: OrderedDict[str, Condition] = OrderedDict()

    def embedded(self, texts: Sequence[str]) -> dict[str, Condition]:
        """Return the condition of each text; those that are not known are embedded together."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._embed(unknown), strict=True))
        found = {}
        for text in texts:
            self._known.move_to_end(text)
            found[text] = self._known[text]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def conditions(self, requests: Sequence[ImageRequest]) -> list[Conditions]:
        """Return the conditions of each request: of its prompt and, where guidance needs it, of its negative prompt."""
        guided = [request.guidance_scale > 1 for request in requests]
        negatives = [request.negative_prompt for request, needed in zip(requests, guided, strict=True) if needed]
        embedded = self.embedded([request.prompt for request in requests] + negatives)
        return [
            Conditions(
                for_request(embedded[request.prompt], request),
                for_request(embedded[request.negative_prompt], request) if needed else None,
            )
            for request, needed in zip(requests, guided, strict=True)
        ]


def for_request(condition: Condition, request: ImageRequest) -> Condition:
    """Return a remembered condition with what is the request's own."""
    return replace(condition, mix=request.mix or (), memory=RowMemory())
