"""What a service can be asked to draw with: the merged model, the base, experts, and mixes of experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from selma_ray.adapters.mixes import Mix
from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import RequestError, invalid_request
from selma_ray.serving.requests import MERGED

__all__ = ["BASE", "Hosted", "ModelNames", "ServedModels"]

BASE = "base"

_MAX_WEIGHT = 2.0
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class ModelNames:
    """The names that a request's `model` may have."""

    merged: str
    base: bool = False
    experts: tuple[str, ...] = ()
    prefix: str = ""
    """What stands before the base's and the experts' names where they are one of several runs'."""

    def all(self) -> tuple[str, ...]:
        """Return every name as clients give it, the default first."""
        return (self.merged, *([self.prefix + BASE] if self.base else []), *self.expert_names)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Return the experts' names as clients give them."""
        return tuple(self.prefix + name for name in self.experts)

    def kind(self, name: str) -> Literal["merged", "base", "expert"]:
        """Return what a name stands for."""
        if name == self.merged:
            return "merged"
        return "expert" if name in self.expert_names else "base"

    def shown(self, mix: Mix | None) -> str | dict[str, float]:
        """Return what a client would ask for to get a mix."""
        if mix is MERGED:
            return self.merged
        if not mix:
            return self.prefix + BASE
        (name, weight), *others = mix
        return self.prefix + name if not others and weight == 1 else {self.prefix + name: each for name, each in mix}

    def mix_of(self, model: str | Mapping[str, float] | None) -> Mix | None:
        """Return the mix that `model` asks for; raises RequestError: 404 for an unknown name, 400 for a weight."""
        if model is None or model == self.merged:
            return MERGED
        if isinstance(model, str):
            name = model.removeprefix(self.prefix)
            if name == BASE and self.base:
                return ()
            if name in self.experts:
                return ((name, 1.0),)
            raise self.unknown(model)
        model = {name.removeprefix(self.prefix): weight for name, weight in model.items()}
        for name, weight in model.items():
            if name not in self.experts:
                raise self.unknown(self.prefix + name, self.expert_names)
            if not -_MAX_WEIGHT <= weight <= _MAX_WEIGHT:
                raise invalid_request(
                    f"model: the weight of {name} must be from {-_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}, got {weight:g}",
                    "model",
                )
        # Sorted, so that equal mixes are equal.
        return tuple(sorted((name, float(weight)) for name, weight in model.items() if weight))

    def unknown(self, name: str, known: tuple[str, ...] | None = None) -> RequestError:
        """Return the refusal (404) of a name that is not among `known`, which is all of them unless it is given."""
        names = ", ".join(self.all() if known is None else known) or "none: no experts are served here"
        return invalid_request(
            f"model {name[:_SHOWN_CHARS]!r} is not served; names: {names}", "model", "model_not_found", status=404
        )


@dataclass(frozen=True)
class ServedModels:
    """The models of a service and where they are.

    Raises ConfigError where an expert's name is taken by the merged model or the base.
    """

    name: str
    """The merged model's name, which a request that names none gets."""
    merged: ModelConfig
    """A pipeline with baked weights."""
    base: ModelConfig | None = None
    """The model that the experts were fitted to; without it the merged model is served alone."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Adapter folders by the experts' names."""
    prefix: str = ""
    """What stands before the base's and the experts' names where clients ask for them."""

    def __post_init__(self) -> None:
        taken = {self.name, BASE} & set(self.experts)
        if taken:
            raise ConfigError(
                f"an expert must not be named {sorted(taken)[0]!r}, as another model is; rename the skill or the adapter"
            )
        if self.experts and self.base is None:
            raise ConfigError("experts can be served beside the base model they were fitted to; name base")

    @property
    def names(self) -> ModelNames:
        """Return the names that can be asked for."""
        return ModelNames(self.name, self.base is not None, tuple(self.experts), self.prefix)


@dataclass(frozen=True)
class Hosted:
    """The models of a run and how they are served."""

    models: ServedModels
    config: ServingConfig
