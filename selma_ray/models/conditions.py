"""What a row of a denoiser's batch is told about its image: embedded texts, remembered, and the family's other inputs."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from selma_ray.models.drawing import Drawing

__all__ = ["Condition", "Conditions", "Texts", "stacked", "trimmed"]

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

    def guided(self, drawings: Sequence[Drawing], above: float = 1.0, unprompted: str = "") -> list[Conditions]:
        """Return the conditions of each image: of its prompt and, with a guidance scale `above` that, of its negative prompt.

        `unprompted` stands for a negative prompt that is empty.
        """
        negatives = [
            (drawing.negative_prompt or unprompted) if drawing.guidance_scale > above else None for drawing in drawings
        ]
        needed = [negative for negative in negatives if negative is not None]
        embedded = self.embedded([drawing.prompt for drawing in drawings] + needed)
        return [
            Conditions(embedded[drawing.prompt], None if negative is None else embedded[negative])
            for drawing, negative in zip(drawings, negatives, strict=True)
        ]


def stacked(parts: Sequence[Condition]) -> dict[str, torch.Tensor]:
    """Return one batch, N first, of parts with N first; texts (T in a tensor's name) are filled up with zeros to the longest."""
    return {name: torch.cat(_equally_long(name, [part[name] for part in parts])) for name in parts[0]}


def trimmed(batch: Condition) -> dict[str, torch.Tensor]:
    """Return a batch without the tokens that `mask_NT` rules out in all of its rows; one without a mask as it is."""
    if "mask_NT" not in batch:
        return dict(batch)
    longest = int(batch["mask_NT"].sum(1).max())
    return {
        name: tensor if (axis := _text_axis(name)) is None else tensor.narrow(axis, 0, longest)
        for name, tensor in batch.items()
    }


def _equally_long(name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    axis = _text_axis(name)
    if axis is None:
        return list(tensors)
    longest = max(tensor.shape[axis] for tensor in tensors)
    return [_filled_up(tensor, axis, longest) for tensor in tensors]


def _filled_up(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    missing = length - tensor.shape[axis]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _text_axis(name: str) -> int | None:
    """Return which axis of a tensor counts tokens, by the shape that its name ends with."""
    shape = name.rpartition("_")[2]
    return shape.index("T") if shape.isupper() and "T" in shape else None
