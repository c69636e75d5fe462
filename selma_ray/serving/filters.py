"""What may be drawn and shown: the content filter that a service names, and the safety checker of Stable Diffusion 1.x."""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from PIL import Image

from selma_ray.errors import ConfigError, first_line
from selma_ray.models.config import ModelConfig
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import RequestError, content_refused

__all__ = ["ContentFilter", "Filters", "SafetyChecker", "check_safety_checker", "open_filters"]


_NO_CHECKER = (
    "serving.safety_checker must be false for a model whose pipeline has no safety_checker and feature_extractor; "
    "name a class in serving.content_filter, or serve a pipeline that has them"
)


class ContentFilter(Protocol):
    """What `serving.content_filter` names: a class without arguments; its methods may be called from several threads."""

    def refused_prompt(self, prompt: str) -> str | None:
        """Return why a prompt is not drawn, in words for its sender; None where it is."""

    def refused_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[str | None]:
        """Return of each image why it is not shown; None where it is."""


class Filters:
    """All filters of a service, asked in turn; what one of them fails on is not shown."""

    def __init__(self, filters: Sequence[ContentFilter]) -> None:
        self._filters = filters

    def __bool__(self) -> bool:
        return bool(self._filters)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise RequestError (400) for the first prompt that is not to be drawn."""
        for prompt in dict.fromkeys(prompts):
            for each in self._filters:
                reason = each.refused_prompt(prompt)
                if reason is not None:
                    raise content_refused(reason, "prompt")

    def check_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[RequestError | None]:
        """Return the refusal (400) of each image that is not to be shown, None of the others."""
        refusals: list[RequestError | None] = [None] * len(images)
        for each in self._filters:
            for index, reason in enumerate(each.refused_images(images, prompts)):
                if reason is not None and refusals[index] is None:
                    refusals[index] = content_refused(reason)
        return refusals


class SafetyChecker:
    """The safety checker that a pipeline of Stable Diffusion 1.x has; raises ConfigError for a pipeline without one."""

    def __init__(self, pipeline: Any) -> None:
        self._checker: Any = getattr(pipeline, "safety_checker", None)
        self._extractor: Any = getattr(pipeline, "feature_extractor", None)
        if self._checker is None or self._extractor is None:
            raise ConfigError(_NO_CHECKER)
        # It announces black images, which are not shown here.
        logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel("ERROR")

    def refused_prompt(self, prompt: str) -> str | None:
        """Return None: it looks at images alone."""
        return None

    def refused_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        """Return a reason for each image that is flagged."""
        import torch

        parameter = next(self._checker.parameters())
        inputs = self._extractor(list(images), return_tensors="pt").pixel_values
        blackened = torch.zeros(len(images), 1)  # in place of the images, which it would blacken
        with torch.inference_mode():
            _, flagged = self._checker(images=blackened, clip_input=inputs.to(parameter.device, parameter.dtype))
        return ["the model's safety checker flagged the image" if each else None for each in flagged]


def check_safety_checker(config: ServingConfig, model: ModelConfig) -> None:
    """Raise ConfigError, before anything is loaded, where a safety checker is asked of a model that has none."""
    if not config.safety_checker:
        return
    from selma_ray.models.family import has_part

    if not (has_part(model, "safety_checker") and has_part(model, "feature_extractor")):
        raise ConfigError(_NO_CHECKER)


def open_filters(config: ServingConfig, pipeline: Any) -> Filters:
    """Return the filters that the configuration asks for; raises ConfigError for one that cannot be had."""
    filters: list[ContentFilter] = [SafetyChecker(pipeline)] if config.safety_checker else []
    if config.content_filter is not None:
        filters.append(_opened(config.content_filter))
    return Filters(filters)


def _opened(path: str) -> ContentFilter:
    """Import and make a class named as package.module:Class."""
    module, _, name = path.partition(":")
    try:
        opened = getattr(import_module(module), name)()
    except Exception as error:
        raise ConfigError(
            f"serving.content_filter must name a class as package.module:Class that every node can import, got {path!r} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    for method in ("refused_prompt", "refused_images"):
        if not callable(getattr(opened, method, None)):
            raise ConfigError(f"serving.content_filter must have a method {method}, {path} has none; write it")
    return opened
