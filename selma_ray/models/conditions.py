"""What a row of a denoiser's batch is told about its image: embedded texts, remembered, and the family's other inputs."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from selma_ray.models.drawing import Drawing

__all__ = ["Condition", "Conditions", "Texts", "stacked"]

_REMEMBERED = 64  # of FLUX a text takes 4 MB

Condition = Mapping[str, torch.Tensor]
"""The conditioning of one row by the names that a family's training examples have, each 1 x ..."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of one image; `negative` is None where one prediction a step is enough."""

    positive: Condition
    negative: Condition | None


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

    def guided(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Return the conditions of each image: of its prompt and, with a guidance scale above 1, of its negative prompt."""
        guided = [drawing.guidance_scale > 1 for drawing in drawings]
        negatives = [drawing.negative_prompt for drawing, needed in zip(drawings, guided, strict=True) if needed]
        embedded = self.embedded([drawing.prompt for drawing in drawings] + negatives)
        return [
            Conditions(embedded[drawing.prompt], embedded[drawing.negative_prompt] if needed else None)
            for drawing, needed in zip(drawings, guided, strict=True)
        ]


def stacked(conditions: Sequence[Condition]) -> dict[str, torch.Tensor]:
    """Return the conditioning of a batch, N first, of rows whose texts are equally long."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
