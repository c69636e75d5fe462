"""The experts of a service, and LoRAs of others, read from their files."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from selma_ray.errors import AdapterError
from selma_ray.models.config import ModelConfig

if TYPE_CHECKING:  # it loads torch, which whoever starts a service does not need
    from selma_ray.adapters.mixing import Expert

__all__ = ["OpenExperts", "check_adapters", "open_experts"]

OpenExperts = Callable[[Mapping[str, str], Any, Any], "Mapping[str, Expert]"]
"""Reads experts from their files, by name, for a denoiser and its pipeline's class."""


def open_experts(paths: Mapping[str, str], denoiser: Any, pipeline_class: Any) -> "dict[str, Expert]":
    """Read experts for a denoiser, by name; called on the replica that mixes them.

    What a LoRA has for text encoders is left out, with a warning. Raises AdapterError where one does not fit.
    """
    from selma_ray.adapters.files import local_adapter
    from selma_ray.adapters.foreign import adapted, read_lora
    from selma_ray.adapters.mixing import LowRank, fitted_expert

    known = adapted(denoiser, pipeline_class.__name__, "the model that is served")
    experts: dict[str, Expert] = {}
    for name, path in paths.items():
        factors = read_lora(local_adapter(path).expanduser(), name, known, skip_text_encoders=True)
        expert = {module: LowRank(each.A_RI, each.scale * each.B_OR) for module, each in factors.items()}
        experts[name] = fitted_expert(name, expert, denoiser)
    return experts


def check_adapters(adapters: Mapping[str, str], model: ModelConfig) -> None:
    """Raise AdapterError, before replicas are started, where one of `serving.adapters` does not fit; no weights of the model are read."""
    if not adapters:
        return
    import diffusers
    import torch

    from selma_ray.models.family import open_family, pipeline_class_of

    family = open_family(model)
    pipeline_class = getattr(diffusers, pipeline_class_of(model, family.located))
    with torch.device("meta"):
        denoiser = family.empty_denoiser()
    for name, path in adapters.items():
        try:
            open_experts({name: path}, denoiser, pipeline_class)
        except AdapterError as error:
            raise AdapterError(f"serving.adapters.{name}: {error}") from None
