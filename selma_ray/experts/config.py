"""How skill experts are fitted (SELMA, section 3.3)."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from selma_ray.adapters.config import LoraSettings
from selma_ray.config import Placement, StrictModel
from selma_ray.judging.config import JudgeConfig, JudgeSetting
from selma_ray.tracking.names import TrackerName

__all__ = [
    "GRADIENTS_AT_ONCE",
    "CheckpointChoiceConfig",
    "DpoConfig",
    "ExpertsConfig",
    "MixedConfig",
    "MoeConfig",
    "NftConfig",
]

GRADIENTS_AT_ONCE = 50_000_000
"""Gradients that workers exchange in one message, at the most; a worker has a buffer for them."""

_LEAST_PRODIGY_RATE = 0.01


class CheckpointChoiceConfig(StrictModel):
    """Choice of checkpoint: adapters are rendered and judged on the dev prompts of their skills beside training, the best is kept."""

    every_steps: int = Field(ge=1)
    """Steps between scored adapters; the last step's is always scored."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Dev prompts rendered for a score; default: all. Sampling and judge are the evaluation's."""
    suite: str | None = None
    """JSON Lines file of dev prompts with questions, as evaluation.suite is; default: the run's own, by the recipe's questions."""
    max_concurrent: Placement[int] = Field(default=1, ge=1)
    """Adapters scored at once, over all experts."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of a scoring task, which waits until training leaves them free."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of a scoring task."""


class MixedConfig(StrictModel):
    """The paper's baseline: one LoRA on the data of all skills together (SELMA, section 5.2)."""

    ranks: tuple[int, ...] = Field(min_length=1)
    """Rank of each such LoRA; alpha/r is that of experts.lora."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of each; default: experts.steps."""

    @field_validator("ranks")
    @classmethod
    def _ranks_differ(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if min(ranks) < 1 or len(set(ranks)) != len(ranks):
            raise ValueError("must be different ranks of at least 1")
        return ranks


class MoeConfig(StrictModel):
    """The paper's MoE-LoRA: linear routers over the frozen experts, fitted to the data of all skills together (SELMA, section 5.2)."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; default: experts.steps."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of the experts' optimiser."""


class DpoConfig(StrictModel):
    """Diffusion-DPO (2311.12908) in the place of denoising: of each prompt, the image of the best score against that of the worst."""

    beta: float = Field(default=5000, gt=0)
    """Strength of the pull towards the base model, 2000 to 5000 there."""


class NftConfig(StrictModel):
    """DiffusionNFT (2509.16117) in the place of denoising: rounds of images that the expert draws itself, good and bad ones both teach."""

    rounds: int = Field(default=60, ge=1)
    """Rounds of drawing, judging and training; each goes on from the last one's adapter."""
    prompts_per_round: int = Field(default=16, ge=1)
    """Prompts of a round, of the expert's training prompts in turn."""
    images_per_prompt: int = Field(default=6, ge=2)
    """Images drawn for each prompt, which are judged against one another: 24 as published."""
    beta: float = Field(default=1.0, gt=0)
    """How far the good and the bad prediction lie from the old one in units of the new one's step; smaller ones learn faster."""
    normalised: bool = True
    """Divide each squared error of the clean latents by its own mean absolute error, as published; false takes the errors of what the model
    predicts as they are."""
    spread_deviations: float = Field(default=2.0, gt=0)
    """Distance from a group's mean score, in deviations of all centred scores of the round, at which an image is wholly good or bad."""
    old_share: float = Field(default=0.9, ge=0, lt=1)
    """Largest share of the drawing adapter that stays after a round; the rest is the trained one."""
    old_share_per_round: float = Field(default=0.02, ge=0, le=1)
    """By how much that share grows with each round, from 0."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Guidance of drawing; 1 is none. What else sampling takes is images.sampling's."""
    sampling_steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of drawing; default: those of images.sampling."""
    judge: JudgeSetting = JudgeConfig()
    """The judge whose score in [0, 1] is the reward: its name, or its settings as those of evaluation.judge."""
    prompts_per_call: int = Field(default=8, ge=1)
    """Prompts whose images a renderer draws together, as far as its memory holds them, before it hands them on."""
    renderers: Placement[int] = Field(default=1, ge=1)
    """Renderers that draw for all experts; they stay for all rounds."""
    cpus_per_renderer: Placement[float] = Field(default=1, gt=0)
    """CPUs of a renderer with its judge."""
    gpus_per_renderer: Placement[float] = Field(default=0, ge=0)
    """GPUs of a renderer with its judge."""

    def steps(self, batch_size: int) -> int:
        """Return the optimiser steps of all rounds."""
        return self.rounds * self.steps_per_round(batch_size)

    def steps_per_round(self, batch_size: int) -> int:
        """Return the optimiser steps of a round: as many as take every image once, where all of them teach something."""
        return -(-self.prompts_per_round * self.images_per_prompt // batch_size)

    def share_after(self, number: int) -> float:
        """Return the share of the drawing adapter that stays after round `number`, counted from 1."""
        return min(self.old_share, self.old_share_per_round * number)


class ExpertsConfig(StrictModel):
    """How one LoRA expert per skill is trained."""

    lora: LoraSettings = LoraSettings()
    """The adapter's shape."""
    steps: int = Field(default=5000, ge=1)
    """Optimiser steps of each expert."""
    batch_size: int = Field(default=64, ge=1)
    """Global batch size of an optimiser step, over all workers and accumulation."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples one worker holds at once; default: its whole share."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = "adamw"
    """`adamw8bit` is bitsandbytes', whose state takes a quarter, on GPUs alone; `prodigy` is prodigyopt's, which finds the learning rate;
    `adafactor` is PyTorch's, whose state takes almost nothing."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate; with prodigy a factor of the one that it finds, 1 as a rule."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the adapter's weights, such as 0.999, which is what is kept; default: the last step's weights are."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision, and that of drawing for `nft` where the model is in fp32; auto takes bf16 where the hardware computes faster in
    it, else fp32 (a CPU with AVX512-BF16 alone draws in bf16 and fits in fp32). fp16 needs a GPU."""
    base_weights: Literal["full", "int8", "nf4"] = "full"
    """What the frozen base is kept in: `full` is the training precision; `int8` and `nf4` (QLoRA) take a half and a quarter of what
    bf16 takes, and round the weights that the expert is fitted on."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time, the same result."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR loss weighting (2303.09556), 5 there; default: all timesteps weigh the same, as in SELMA."""
    guidance_scale: float = Field(default=3.5, ge=0)
    """Guidance that a transformer distilled for it (FLUX) is told in training; other models are told none."""
    caption_dropout: float = Field(default=0, ge=0, lt=1)
    """Share of examples whose caption is replaced by the empty one; SELMA drops none."""
    workers_per_expert: int = Field(default=1, ge=1)
    """Ray Train workers of each expert."""
    cpus_per_worker: Placement[float] = Field(default=1, gt=0)
    """CPUs of a worker, and its threads; where it alone learns in rounds on one machine, it has those of nft's renderers too."""
    gpus_per_worker: Placement[float] = Field(default=0, ge=0)
    """GPUs of a worker; 0 trains on the CPU."""
    encoders: Placement[int] = Field(default=1, ge=1)
    """Actors that encode images and captions before training; each holds the autoencoder and the text encoder."""
    max_concurrent: Placement[int | None] = Field(default=None, ge=1)
    """Experts fitted at once, the others in turn; default: as many as the cluster's resources allow."""
    checkpoint_every_steps: Placement[int] = Field(default=500, ge=1)
    """Steps between checkpoints."""
    fused: Placement[bool] = False
    """Fit all skills' experts in one process with one forward pass, each row of the batch with its own adapter: one base in memory in the
    place of one an expert, and the same experts up to rounding."""
    trackers: Placement[tuple[TrackerName, ...]] = ("tensorboard",)
    """Where curves and, with `selection`, sample images of the dev prompts go while training: `tensorboard` files in the run's folder,
    `wandb`, `mlflow`, `trackio`, each with the environment variables of its own client on every node (WANDB_API_KEY, …)."""
    max_failures: Placement[int] = Field(default=2, ge=0)
    """Restarts from the last checkpoint; experts that take turns share them."""
    selection: CheckpointChoiceConfig | None = None
    """Choice of checkpoint by dev score; default: the last step's is kept."""
    early_stop: int | None = Field(default=None, ge=1)
    """Checkpoints of `selection` in a row that bring no better dev score until training stops, however fast they are scored; default:
    never. Time is saved where scoring has CPUs or GPUs beside training; where it waits for training's, later steps are thrown away."""
    mixed: MixedConfig | None = None
    """LoRAs on all skills' data together beside the experts, named mixed-r<rank>; default: no such LoRAs."""
    moe: MoeConfig | None = None
    """A mixture of the finished experts, named moe; default: no mixture. It is scored beside them, and cannot be merged or exported."""
    dpo: DpoConfig | None = None
    """Fit to preferences; default: to the images as they are. Needs images.selection, whose judge makes the pairs."""
    nft: NftConfig | None = None
    """Fit in rounds to images that each expert draws itself, judged against one another; default: to the images that are there. Then
    experts.steps follows from the rounds."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "ExpertsConfig":
        if self.batch_size % self.workers_per_expert:
            raise ValueError(
                f"batch_size must divide by workers_per_expert, got {self.batch_size} and {self.workers_per_expert}"
            )
        per_worker = self.batch_size // self.workers_per_expert
        if self.micro_batch_size and per_worker % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide a worker's share of the batch ({per_worker}), got {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _dpo_stands_alone(self) -> "ExpertsConfig":
        if self.dpo and self.min_snr_gamma is not None:
            raise ValueError(f"min_snr_gamma must be left out with dpo, got {self.min_snr_gamma:g}")
        if self.dpo and self.moe:
            raise ValueError("moe is fitted by denoising alone and must be left out with dpo")
        return self

    @model_validator(mode="after")
    def _nft_stands_alone(self) -> "ExpertsConfig":
        if self.nft is None:
            return self
        others = {
            "dpo": self.dpo,
            "moe": self.moe,
            "selection": self.selection,
            "min_snr_gamma": self.min_snr_gamma,
            "ema": self.ema,
            "caption_dropout": self.caption_dropout or None,
        }
        taken = next((name for name, value in others.items() if value is not None), None)
        if taken:
            raise ValueError(f"{taken} must be left out with nft, which has no use for it")
        if self.zero_stage == 3:
            raise ValueError(
                "zero_stage must be at most 2 with nft, whose old adapter takes the new one's place in turn, got 3"
            )
        return self

    @model_validator(mode="after")
    def _fused_learns_from_images_apart(self) -> "ExpertsConfig":
        other = next((name for name in ("dpo", "ema", "early_stop") if getattr(self, name) is not None), None)
        if self.fused and other:
            raise ValueError(f"fused must be false with {other}, whose experts are fitted one by one")
        if self.fused and self.optimizer != "adamw":
            raise ValueError(f"optimizer must be adamw with fused, whose experts share one, got {self.optimizer}")
        if self.fused and self.precision == "fp16":
            raise ValueError("precision must be auto, bf16 or fp32 with fused, whose losses are not scaled, got fp16")
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay_whole(self) -> "ExpertsConfig":
        if self.base_weights == "full":
            return self
        if self.zero_stage == 3:
            raise ValueError(f"zero_stage must be at most 2 with base_weights {self.base_weights}, got 3")
        if self.moe:
            raise ValueError(f"moe needs base_weights full, got {self.base_weights}")
        return self

    @model_validator(mode="after")
    def _optimizer_works(self) -> "ExpertsConfig":
        if self.optimizer == "adamw8bit" and not self.gpus_per_worker:
            raise ValueError("optimizer adamw8bit needs gpus_per_worker above 0; take adamw or adafactor on the CPU")
        if self.optimizer == "adafactor" and self.zero_stage:
            raise ValueError(
                f"optimizer adafactor needs zero_stage 0, as ZeRO flattens what it factors, got {self.zero_stage}"
            )
        if self.optimizer == "prodigy" and self.workers_per_expert > 1:
            raise ValueError(
                f"optimizer prodigy needs workers_per_expert 1, as it measures all weights together, got {self.workers_per_expert}"
            )
        if self.optimizer == "prodigy" and self.learning_rate < _LEAST_PRODIGY_RATE:
            raise ValueError(
                f"learning_rate multiplies what optimizer prodigy finds and must be at least {_LEAST_PRODIGY_RATE:g}, "
                f"got {self.learning_rate:g}; set 1"
            )
        return self

    @model_validator(mode="after")
    def _early_stop_has_scores(self) -> "ExpertsConfig":
        if self.early_stop and self.selection is None:
            raise ValueError(
                "early_stop needs selection, whose dev scores it goes by; set experts.selection.every_steps"
            )
        return self

    @model_validator(mode="after")
    def _fp16_has_a_gpu(self) -> "ExpertsConfig":
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ValueError("precision fp16 needs gpus_per_worker above 0; take auto, bf16 or fp32")
        return self
