"""What a family of text-to-image models must offer: to be trained (Family, Encoders) and to draw step by step (Predictor).

A family is one file, which offers both, and one line in `families.FAMILIES`.

Shapes: N examples or rows, H x W pixels, C latent channels, h x w latent pixels, T text tokens, D text width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from selma_ray.errors import ConfigError, ModelNotFoundError, RenderError
from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.course import Course
from selma_ray.models.drawing import Drawing
from selma_ray.models.families import FAMILIES
from selma_ray.models.hub import hub_file
from selma_ray.models.locate import LocatedModel, locate_text_to_image
from selma_ray.models.noising import Noised

__all__ = [
    "DEFAULT_LOSS",
    "Batch",
    "Encoders",
    "Family",
    "LossSettings",
    "Predictor",
    "has_part",
    "open_family",
    "open_predictor",
    "pipeline_class_of",
    "predictor_class",
]

Batch = Mapping[str, torch.Tensor]
"""Encoded examples by name, N first: `latent_mean` and `latent_std` (NChw) and whatever the family conditions on.

A name ends with its tensor's shape; what has a T there may be of any length, and `mask_NT` tells which tokens are the text's own.
"""


@dataclass(frozen=True)
class LossSettings:
    """What a recipe says about the loss; each family uses what is defined for it."""

    min_snr_gamma: float | None = None
    """Weight of diffusion's timesteps, by min(SNR, gamma); None weighs all the same."""
    guidance_scale: float = 3.5
    """What a transformer distilled for guidance is told."""


DEFAULT_LOSS = LossSettings()


class Encoders(Protocol):
    """The parts that turn images and captions into what the denoiser learns from."""

    def encode_images(self, images_NHW3: np.ndarray) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw) of uint8 images, unscaled but for what the autoencoder's weights scale."""

    def encode_prompts(self, prompts: Sequence[str], height_px: int, width_px: int) -> dict[str, torch.Tensor]:
        """Return the conditioning of each prompt, N first; sizes are those of its image."""

    def encode_no_caption(self) -> dict[str, torch.Tensor]:
        """Return what replaces the conditioning of an example whose caption is dropped, N = 1."""


class Family(Protocol):
    """A text-to-image model whose encoders and denoiser load apart, so that a trainer never holds the encoders."""

    located: LocatedModel
    predictions_per_step: int
    """Calls of the denoiser in a guided sampling step: 2 with classifier-free guidance, 1 where guidance is an input."""

    guides_above: float
    """Guidance scale above which a sampling step is guided: 1, or 0 where a family counts from 0."""

    upcasts_autoencoder: bool
    """Whether its pipeline decodes in fp32 what it draws in fp16, where the autoencoder's configuration says so."""

    def load_encoders(self, device: torch.device | str) -> Encoders:
        """Load the autoencoder and the text encoders in the model's precision, onto a device."""

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Load the denoiser alone, in a precision of its own."""

    def empty_denoiser(self) -> Any:
        """Return the denoiser as its configuration says, on the default device, without its weights."""

    def example_shapes(self, height_px: int, width_px: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an encoded example, without N; of a text of any length that of the longest."""

    @property
    def unit_px(self) -> int:
        """Return what both sides of an image must divide by."""

    def decoded_shape(self, height_px: int, width_px: int) -> tuple[int, ...]:
        """Return the shape, without N, of what the autoencoder turns into an image."""

    def drawn_example(self, latents_NChw: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `latent_mean` and `latent_std` (NChw, fp32, on the CPU) of latents that were drawn: those, without a spread."""

    def errors(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        settings: LossSettings = DEFAULT_LOSS,
    ) -> torch.Tensor:
        """Return each example's training error (N, fp32), whose mean is the loss of denoising.

        All randomness of an example comes from its own generator.
        """

    def noised(
        self, batch: Batch, generators: Sequence[torch.Generator], settings: LossSettings = DEFAULT_LOSS
    ) -> Noised:
        """Return the examples with the noise that `errors` would put on them, from the same generators."""

    def predict(self, denoiser: torch.nn.Module, noised: Noised) -> torch.Tensor:
        """Return the denoiser's prediction of each noised example (NChw), in its precision."""

    def errors_by_level(
        self,
        denoiser: torch.nn.Module,
        batch: Batch,
        generators: Sequence[torch.Generator],
        settings: LossSettings = DEFAULT_LOSS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `errors` returns, and the noise level of each example, from 0 to 1 for noise alone (both N)."""


class Predictor(Protocol):
    """A loaded pipeline, taken apart so that images at different timesteps can share a call of the denoiser."""

    denoiser: Any
    """The UNet or transformer; whoever adapts it adapts what is predicted."""

    def tokens(self, text: str) -> tuple[int, int]:
        """Return how many tokens a text has, and how many of them the model sees."""

    texts_vary: bool
    """Whether conditions of different texts differ in length."""

    @staticmethod
    def call_arguments(pipeline: Any, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """Return the guidance, and what it starts from, as a call of the pipeline for `count` images takes them."""

    def encode(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        """Embed the texts of each image; raises DrawingError for what the model cannot draw."""

    def rows_of(self, drawing: Drawing) -> int:
        """Return how many rows of a step an image takes: as many conditions as `encode` gives it."""

    def start(self, drawing: Drawing) -> Course:
        """Draw the initial noise of an image; raises DrawingError for what the model cannot draw."""

    def predict(
        self, inputs_NChw: torch.Tensor, timesteps_N: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Return the model's prediction for each row (NChw), whatever the lengths of their texts."""

    def guide(
        self, drawing: Drawing, predicted_NChw: torch.Tensor, unconditional_NChw: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction to follow, by the family's own way of guidance; without a negative condition there is one alone."""

    def decode(self, latents_NChw: torch.Tensor) -> list[Image.Image | RenderError]:
        """Turn latents into RGB images; one that is not finite is an error in its place."""


def open_family(model: ModelConfig) -> Family:
    """Return the family that a model's `model_index.json` names; raises ConfigError for one that has no trainer."""
    located = locate_text_to_image(model.name, model.revision)
    pipeline_class = pipeline_class_of(model, located)
    if pipeline_class not in FAMILIES:
        raise ConfigError(
            f"model.name must be a family that experts can be fitted to ({', '.join(FAMILIES)}), got {model.name} ({pipeline_class})"
        )
    module, family, _ = FAMILIES[pipeline_class]
    return getattr(import_module(f"selma_ray.models.{module}"), family)(model, located)


def open_predictor(pipeline: Any) -> Predictor:
    """Return a loaded pipeline taken apart, by its family; raises ConfigError for a family that cannot be served."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ConfigError(f"the model to serve must be one of {', '.join(FAMILIES)}, got {name}")
    return predictor_class(name)(pipeline)


def predictor_class(pipeline_class: str) -> Any:
    """Return the predictor of a family by the name of its pipeline's class; of an unknown one, what most families do alike."""
    from selma_ray.models.predicting import PipelinePredictor

    if pipeline_class not in FAMILIES:
        return PipelinePredictor
    module, _, predictor = FAMILIES[pipeline_class]
    return getattr(import_module(f"selma_ray.models.{module}"), predictor)


def has_part(model: ModelConfig, name: str) -> bool:
    """Tell whether a pipeline has an optional part, such as a safety_checker, by its `model_index.json` alone."""
    return any(_index(model, locate_text_to_image(model.name, model.revision)).get(name) or ())


def pipeline_class_of(model: ModelConfig, located: LocatedModel) -> str:
    """Return the name of the pipeline's class that a model's `model_index.json` gives."""
    return _index(model, located)["_class_name"]


def _index(model: ModelConfig, located: LocatedModel) -> Mapping[str, Any]:
    path = Path(located.path) / "model_index.json"
    if not path.is_file():
        path = hub_file("model.name", located.path, "model_index.json", model.revision)
    try:
        index = json.loads(path.read_text())
        index["_class_name"]
        return index
    except (ValueError, KeyError, TypeError):
        raise ModelNotFoundError(f"{path} must be a pipeline's index with _class_name; save the model again") from None
