"""The sampler of a pipeline, as a recipe names and sets it, checked against diffusers' class before an image is drawn."""

import difflib
import inspect
import math
import typing
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

import torch

from selma_ray.errors import ConfigError, first_line
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.models.parts import load_config

__all__ = ["check_sampling", "use_scheduler"]

_TRIED_STEPS = 10


def use_scheduler(pipeline: Any, name: str | None, config: Mapping[str, Any] | None = None) -> None:
    """Give a pipeline the scheduler class `name`, its own where there is none, with its own scheduler's configuration and `config` over it.

    Raises ConfigError for a class that cannot take that configuration, such as a diffusion sampler for a flow model, and for a setting
    that the class does not have, or not with that value.
    """
    own = pipeline.scheduler
    if not config and name in (None, type(own).__name__):
        return
    compatible = {each.__name__: each for each in [type(own), *own.compatibles]}
    if name is not None and name not in compatible:
        raise ConfigError(
            f"sampling.scheduler must be a diffusers scheduler that fits the model ({', '.join(sorted(compatible))}), got {name!r}"
        )
    scheduler_class = compatible[name or type(own).__name__]
    pipeline.scheduler = (
        _configured(scheduler_class, own.config, config) if config else scheduler_class.from_config(own.config)
    )


def check_sampling(model: ModelConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError where a model's sampler cannot be set as a recipe says; of the model only its scheduler's settings are read."""
    import diffusers

    located = locate_text_to_image(model.name, model.revision)
    own = load_config(model, located, diffusers.DDPMScheduler, "scheduler")
    scheduler = getattr(diffusers, own["_class_name"]).from_config(own)
    use_scheduler(SimpleNamespace(scheduler=scheduler), sampling.scheduler, sampling.scheduler_config)


def _configured(scheduler_class: Any, own: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    for key, value in config.items():
        _check_setting(scheduler_class, key, value)
    words = ", ".join(f"{key}={value}" for key, value in config.items())
    fault = f"sampling.scheduler_config {words} cannot be used by {scheduler_class.__name__}"
    try:
        scheduler = scheduler_class.from_config(own, **config)
        is_zero = scheduler.config.get("rescale_betas_zero_snr", False)
        if is_zero and scheduler.config.get("prediction_type") == "epsilon":
            # Where there is no signal, the noise says nothing about the image, which is found by dividing by 0.
            raise ConfigError(
                f"{fault}: zero terminal SNR needs a model of v_prediction, this one has epsilon; leave it out"
            )
        needs_shift = scheduler.config.get("use_dynamic_shifting", False)
        scheduler.set_timesteps(_TRIED_STEPS, **({"mu": 1.0} if needs_shift else {}))
    except (ValueError, TypeError, NotImplementedError, ImportError, AttributeError) as error:
        raise ConfigError(f"{fault}: {first_line(error)}; change or leave it out") from None
    figures = [tensor for name in ("timesteps", "sigmas") if (tensor := getattr(scheduler, name, None)) is not None]
    if not all(bool(torch.isfinite(torch.as_tensor(tensor, dtype=torch.float64)).all()) for tensor in figures):
        raise ConfigError(f"{fault}: its noise levels are not finite; change or leave it out")
    return scheduler


def _check_setting(scheduler_class: Any, key: str, value: Any) -> None:
    """Raise ConfigError for a setting that a scheduler's constructor does not have, or has of another kind."""
    known = {
        name: each for name, each in inspect.signature(scheduler_class.__init__).parameters.items() if name != "self"
    }
    name = f"sampling.scheduler_config.{key}"
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(sorted(known))}"
        raise ConfigError(f"{name} is no setting of {scheduler_class.__name__}; {remedy}")
    default, annotation = known[key].default, typing.get_type_hints(scheduler_class.__init__).get(key)
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    if choices and value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    # A setting without a default of its own says too little, and diffusers' annotations are wrong for some.
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    if isinstance(default, (int, float)) and not isinstance(default, bool) and not _is_number(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
