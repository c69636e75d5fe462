"""Which experiments a study makes: a YAML file of its own, that names the recipe that they change."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from selma_ray.config import Placement, StrictModel

__all__ = ["ArmConfig", "Kind", "StudyConfig"]

Kind = Literal["experts", "mixed", "moe", "merged"]

_NAME = r"[a-z0-9][a-z0-9_-]*"


class ArmConfig(StrictModel):
    """One experiment: the recipe with some of its values replaced."""

    title: str = Field(min_length=1)
    """What the tables call it."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Values that replace the recipe's, by key.path."""
    models: tuple[Kind, ...] = Field(default=("merged",), min_length=1)
    """Which of its models are scored, and made: the skills' experts, the mixed LoRAs, the mixture of experts, the merged model."""


class StudyConfig(StrictModel):
    """Experiments that are compared with the same base model on the same prompts and seeds."""

    recipe: str
    """The recipe that the experiments change: a path relative to the study's file."""

    run_dir: Placement[str | None] = None
    """The folder of the recipe's run, which holds the study; default: the recipe's own."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Every experiment is made once for each; prompts, images, training and scored images all follow from it."""
    guidance_scales: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    """Guidance scales that every model is scored at."""
    suite: str | None = Field(default=None, min_length=1)
    """Suite that models are scored on; default: evaluation.suite, whose captions alone are kept out of training. The scores, tables and
    pictures of another suite are in the study's folder `suite=NAME`."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Prompts of the suite that are rendered for a score; default: evaluation.max_prompts."""
    reference: str = "selma"
    """The experiment whose merged model the others are compared with."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The experiments by name, in order; what one shares with an earlier one is not made again."""

    @field_validator("seeds", "guidance_scales")
    @classmethod
    def _none_twice(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) != len(values) or min(values) < 0:
            raise ValueError("must be different numbers from 0 on")
        return values

    @field_validator("arms")
    @classmethod
    def _names_fit_folders(cls, arms: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        wrong = next((name for name in arms if not re.fullmatch(_NAME, name)), None)
        if wrong is not None:
            raise ValueError(f"must have names of lower-case letters, digits, - and _, not {wrong!r}")
        return arms
