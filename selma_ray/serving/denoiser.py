"""A model as the engine sees it: a family's predictor, with experts mixed apart for each row, and step caching.

Shapes: N rows or images, C latent channels, h x w latent pixels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from selma_ray.adapters.mixes import Mix
from selma_ray.adapters.mixing import Expert, ExpertLayers
from selma_ray.errors import ConfigError, DrawingError, RenderError
from selma_ray.models.conditions import Condition
from selma_ray.models.course import Course
from selma_ray.models.family import Predictor, open_predictor
from selma_ray.models.parts import denoiser_name
from selma_ray.models.step_caching import DeepFeatures, RowMemory
from selma_ray.serving.errors import invalid_request
from selma_ray.serving.requests import ImageRequest

__all__ = ["Denoiser", "RequestRows", "Row", "denoiser_for"]

_PARAMS = {"steps": "num_inference_steps", "size_px": "size"}
"""What the API calls a Drawing's fields, where it has another name for them."""


@dataclass(frozen=True)
class Row:
    """One row of the denoiser's batch."""

    condition: Condition
    mix: Mix = ()
    """Experts that take part in this row."""
    memory: RowMemory = field(default_factory=RowMemory)
    """What step caching keeps of this row."""


@dataclass(frozen=True)
class RequestRows:
    """The rows of one request; `negative` is None where one prediction a step is enough."""

    positive: Row
    negative: Row | None


def denoiser_for(
    pipeline: Any, experts: Mapping[str, Expert] | None = None, cache_interval: int = 1, fixed_rows: int | None = None
) -> "Denoiser":
    """Return the denoiser of a loaded pipeline, with experts that its requests may mix, and step caching above interval 1.

    With `fixed_rows` every call of the model has that many rows.

    Raises ConfigError for a family that cannot be served and for step caching without a UNet, AdapterError for an expert that
    does not fit.
    """
    predictor = open_predictor(pipeline)
    if cache_interval > 1 and denoiser_name(pipeline) != "unet":
        raise ConfigError(
            f"cache_interval must be 1 for {type(pipeline).__name__}, got {cache_interval}; step caching is for UNets"
        )
    return Denoiser(predictor, experts, cache_interval, fixed_rows)


class Denoiser:
    """Starts, predicts and decodes requests; what the model cannot draw is a RequestError (400).

    Kernels round differently for other numbers of rows: with `fixed_rows` each call has that many, of one set of experts, the last
    ones filled up, so that what a row gets does not depend on the rows beside it, to the last bit.
    """

    def __init__(
        self,
        predictor: Predictor,
        experts: Mapping[str, Expert] | None = None,
        cache_interval: int = 1,
        fixed_rows: int | None = None,
    ) -> None:
        self._fixed_rows = fixed_rows
        self._predictor = predictor
        self.device: torch.device = predictor.denoiser.device
        self._deep_features = DeepFeatures(predictor.denoiser, cache_interval) if cache_interval > 1 else None
        self._experts = ExpertLayers(predictor.denoiser, experts or {})

    def add_experts(self, experts: Mapping[str, Expert]) -> None:
        """Add what `fitted_expert` returned, between two predictions."""
        for name, expert in experts.items():
            self._experts.add(name, expert)

    def remove_experts(self, names: Iterable[str]) -> None:
        """Forget experts that no row mixes any more, between two predictions."""
        for name in names:
            self._experts.remove(name)

    def encode(self, requests: Sequence[ImageRequest]) -> list[RequestRows]:
        """Embed the texts of each request; raises RequestError (400) for what the model cannot draw."""
        with _refused():
            encoded = self._predictor.encode(requests)
        return [
            RequestRows(
                Row(conditions.positive, request.mix or ()),
                None if conditions.negative is None else Row(conditions.negative, request.mix or ()),
            )
            for request, conditions in zip(requests, encoded, strict=True)
        ]

    def rows_of(self, request: ImageRequest) -> int:
        """Return how many rows of a step a request takes."""
        return self._predictor.rows_of(request)

    def start(self, request: ImageRequest) -> Course:
        """Draw the initial noise of a request; raises RequestError (400) for what the model cannot draw."""
        with _refused():
            return self._predictor.start(request)

    def predict(self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Return the prediction for each row (NChw), in one call of the model whatever experts the rows mix; two with step caching."""
        if self._deep_features is None:
            return self._predict(inputs_NChw, timesteps_N, rows)
        return self._deep_features.predict(
            lambda chosen: self._predict(inputs_NChw[chosen], timesteps_N[chosen], [rows[index] for index in chosen]),
            [row.memory for row in rows],
        )

    def guide(
        self, request: ImageRequest, predicted_NChw: torch.Tensor, unconditional_NChw: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction that a request follows."""
        return self._predictor.guide(request, predicted_NChw, unconditional_NChw)

    def decode(self, latents_NChw: torch.Tensor) -> list[Image.Image | RenderError]:
        """Turn latents into RGB images; one that is not finite is an error in its place."""
        return self._predictor.decode(latents_NChw)

    def _predict(self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        if self._fixed_rows is None:
            return self._call(inputs_NChw, timesteps_N, rows)
        predicted: dict[int, torch.Tensor] = {}
        for part in _parts(rows, self._fixed_rows):
            filled = [*part, *part[-1:] * (self._fixed_rows - len(part))]
            answers_RChw = self._call(inputs_NChw[filled], timesteps_N[filled], [rows[index] for index in filled])
            predicted |= zip(part, answers_RChw.split(1), strict=False)  # what was filled up is left out
        return torch.cat([predicted[index] for index in range(len(rows))])

    def _call(self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        self._experts.weigh([row.mix for row in rows])
        return self._predictor.predict(inputs_NChw, timesteps_N, [row.condition for row in rows])


def _parts(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Return the indices of rows in parts of at most `size`, each of rows with the same experts and texts of one length."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shapes = tuple(tensor.shape for tensor in row.condition.values())
        together.setdefault((shapes, *(name for name, weight in row.mix if weight)), []).append(index)
    return [indices[start : start + size] for indices in together.values() for start in range(0, len(indices), size)]


@contextmanager
def _refused() -> Iterator[None]:
    """Turn what a model cannot draw into the refusal of a request."""
    try:
        yield
    except DrawingError as error:
        raise invalid_request(str(error), _PARAMS.get(error.field, error.field)) from None
