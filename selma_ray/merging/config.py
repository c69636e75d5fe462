"""How experts are merged (SELMA, section 3.4)."""

import re
from typing import Literal

from pydantic import Field, model_validator

from selma_ray.config import Placement, StrictModel

__all__ = ["DistilConfig", "MergingConfig", "RegmeanConfig", "SearchConfig"]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
_NEEDS_POSITIVE_WEIGHTS = ("ties", "knots", "core_space", "regmean")


class SearchConfig(StrictModel):
    """How `merging.method: search` looks for weights and scale on the dev splits, by CMA-ES (Hansen 2016)."""

    generations: int = Field(default=8, ge=1)
    """Rounds of candidates, each drawn from what the rounds before scored."""
    candidates: int = Field(default=8, ge=2)
    """Candidates of a round, rendered and judged in parallel."""
    step: float = Field(default=0.5, gt=0, le=2)
    """First standard deviation of a weight, in units of 1/K, the weight of the plain mean."""
    largest: float = Field(default=3.0, gt=1)
    """Largest weight, in units of 1/K."""
    by_block: bool = False
    """Search one weight per skill for each group of blocks (down, mid, up) instead of one for all."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Dev prompts that a candidate renders, taken from the skills in turn; default: all. Sampling and judge are the evaluation's."""
    suite: str | None = None
    """JSON Lines file of dev prompts with questions, as evaluation.suite is; default: the run's own, by the recipe's questions."""


class DistilConfig(StrictModel):
    """On-policy distillation (2605.15055, 2605.08063): a student starts at a merge, and experts correct it on its own states."""

    start: Literal[
        "average_deltas",
        "average_factors",
        "sum_deltas",
        "svd",
        "ties",
        "dare",
        "knots",
        "core_space",
        "tsv_m",
        "iso_c",
    ] = "average_deltas"
    """Merge that the student starts at."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the student; default: that of the start, the sum of the experts' for a mean."""
    steps: int = Field(default=64, ge=1)
    """Optimiser steps, each over all skills."""
    prompts_per_skill: int = Field(default=4, ge=1)
    """Images that the student draws for each skill in a step, of its training prompts in turn."""
    states_per_image: int = Field(default=4, ge=1)
    """States of each image's course that are learnt from."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    sampling_steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of the student's drawing; default: those of images.sampling, as is what else sampling takes."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Guidance that the student draws with and is corrected at; 1 is none."""
    teacher_guidance_scale: float | None = Field(default=None, ge=0)
    """Guidance of the experts that correct it; a larger one distils guidance into the student. Default: the student's."""
    anchor: float = Field(default=0, ge=0)
    """Weight of the base's own prediction as one more teacher of every skill, against drift (Flow-OPD)."""
    checkpoint_every_steps: Placement[int] = Field(default=16, ge=1)
    """Steps between checkpoints."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of the process that trains the student."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of the process that trains the student."""


class RegmeanConfig(StrictModel):
    """What `merging.method: regmean` takes of the experts' inputs (2212.09849); a module of I inputs takes I x I numbers an expert."""

    examples: int = Field(default=256, ge=1)
    """Cached examples that each expert is run over, with the noise of its training."""
    off_diagonal: float = Field(default=0.9, ge=0, le=1)
    """What products of two different inputs count; 0.9 there, 0 takes variances alone."""


class MergingConfig(StrictModel):
    """How skill experts become one model."""

    method: Literal[
        "average_deltas",
        "average_factors",
        "released_scale",
        "sum_deltas",
        "svd",
        "ties",
        "dare",
        "knots",
        "core_space",
        "tsv_m",
        "iso_c",
        "regmean",
        "distil",
        "search",
    ] = "average_deltas"
    """`average_deltas` is the exact mean of the experts' deltas; `average_factors` averages A and B apart, as the paper writes;
    `released_scale` weighs each delta as SELMA's released code does by mistake; `sum_deltas` adds them; `svd` is the mean cut to a
    rank; `ties`, `dare`, `knots` and `core_space` keep experts from undoing one another; `tsv_m` sums decorrelated singular vectors,
    `iso_c` gives all directions of the mean one strength; `regmean` comes nearest to each expert's outputs on its own training examples,
    over which each is run once; `search` looks for the best weights on the dev splits; `distil` trains a student that starts at a merge
    and is corrected by the experts."""
    experts: dict[str, str] | None = None
    """Adapters to merge in the place of the run's own, by name: a LoRA file of diffusers, kohya or ai-toolkit, an adapter's folder, or
    a run's folder, whose expert or merge of that name is meant. They may adapt different modules at different ranks."""
    skip_text_encoders: bool = False
    """Leave out what a LoRA file holds for text encoders; otherwise that of CLIP is merged for Stable Diffusion 1.x, 2.x and XL, and a
    file with parts for other text encoders is refused."""
    weights: dict[str, float] | None = None
    """Weight of each skill; default: all the same. The means (`average_deltas`, `average_factors`, `svd`) divide weights by their sum."""
    scale: float = 1.0
    """Factor on the merged delta."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of `svd`, and of the adapter that stands for a `ties` or `dare` merge; default: the largest of the experts'."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each expert's entries that `ties`, `dare`, `knots` and `core_space` keep."""
    adapter_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the merged adapter's file; the 16-bit ones are half as large. The baked pipeline is made of the merge itself."""
    exports: tuple[Literal["diffusers", "kohya", "comfyui"], ...] = ("diffusers", "kohya", "comfyui")
    """Files written beside adapter and pipeline: `diffusers` loads with `load_lora_weights`; `kohya`, of UNets, in ComfyUI and A1111;
    `comfyui`, of FLUX, FLUX.2, Qwen-Image and Z-Image, in ComfyUI."""
    export_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of those files: the 16-bit ones are half as large, and loaders convert either to their model's."""
    export_experts: bool = False
    """Write the same files for every expert too, to experts/<skill>/ in the merged model's folder."""
    distil: DistilConfig = DistilConfig()
    """How `method: distil` trains its student."""
    regmean: RegmeanConfig = RegmeanConfig()
    """How `method: regmean` measures."""
    search: SearchConfig = SearchConfig()
    """How `method: search` searches."""
    name: str = Field(default="merged", pattern=_NAME)
    """Name of the merged model's folder."""

    @model_validator(mode="after")
    def _experts_have_exports(self) -> "MergingConfig":
        if self.export_experts and not self.exports:
            raise ValueError("export_experts needs a file format in exports, which is empty")
        return self

    @model_validator(mode="after")
    def _experts_can_be_merged(self) -> "MergingConfig":
        if self.experts is None:
            return self
        if not self.experts:
            raise ValueError("experts must name an adapter, or be left out for the run's own")
        for name in self.experts:
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"experts must have names of letters, digits, _ and -, got {name!r}")
        if self.method == "search":
            raise ValueError(
                "experts must be left out with method search, which weighs the run's own by their dev prompts"
            )
        if self.method == "distil":
            raise ValueError("experts must be left out with method distil: each teaches the prompts of its own skill")
        if self.method == "regmean":
            raise ValueError("experts must be left out with method regmean, which needs the examples of the run's own")
        return self

    @model_validator(mode="after")
    def _weights_fit_the_method(self) -> "MergingConfig":
        if self.weights is None:
            return self
        if self.method in ("released_scale", "search"):
            raise ValueError(f"weights must be left out with method {self.method}, which sets them")
        lowest = min(self.weights.values(), default=0.0)
        if self.method in _NEEDS_POSITIVE_WEIGHTS and lowest < 0:
            raise ValueError(f"weights must not be negative with method {self.method}, got {lowest:g}")
        return self
