"""What a service can be asked for: the models of its own run, and those of the runs that serving.models names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import RequestError, invalid_request
from selma_ray.serving.served import ModelNames

__all__ = ["Catalogue", "Entry"]


@dataclass(frozen=True)
class Entry:
    """A run's models as clients see them."""

    names: ModelNames
    config: ServingConfig
    run: str = ""
    """Its name in serving.models; none: the service's own."""


@dataclass(frozen=True)
class Catalogue:
    """The entries of a service by run, its own under no name."""

    entries: Mapping[str, Entry]

    @property
    def own(self) -> Entry:
        """Return the service's own run, which a request that names no model gets."""
        return self.entries[""]

    def all(self) -> tuple[str, ...]:
        """Return every name that can be asked for, the default first."""
        return tuple(name for entry in self.entries.values() for name in entry.names.all())

    def kind(self, name: str) -> Literal["merged", "base", "expert"]:
        """Return what a name stands for."""
        return self._with(name).names.kind(name)

    def entry_of(self, model: str | Mapping[str, float] | None) -> Entry:
        """Return the run that `model` asks for; raises RequestError: 404 for an unknown name, 400 for a mix of several runs."""
        if model is None or not model:
            return self.own
        if isinstance(model, str):
            if model not in self.all():
                raise self.unknown(model)
            return self._with(model)
        runs = {self._run_of(name) for name in model}
        if len(runs) > 1:
            shown = ", ".join(sorted(run or self.own.names.merged for run in runs))
            raise invalid_request(
                f"model: a mix must be of the experts of one run, these are of {shown}; name those of one", "model"
            )
        return self.entries[runs.pop()]

    def with_experts(self, run: str, experts: tuple[str, ...]) -> "Catalogue":
        """Return the catalogue with other experts of a run."""
        entry = self.entries[run]
        return Catalogue({**self.entries, run: replace(entry, names=replace(entry.names, experts=experts))})

    def unknown(self, name: str) -> RequestError:
        """Return the refusal (404) of a name, with all that are known."""
        return self.own.names.unknown(name, self.all())

    def _with(self, name: str) -> Entry:
        return next((entry for entry in self.entries.values() if name in entry.names.all()), self.own)

    def _run_of(self, expert: str) -> str:
        run, slash, _ = expert.partition("/")
        return run if slash and run in self.entries else ""
