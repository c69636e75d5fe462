"""What a recipe will take, before anything runs: weights, memory of a GPU, GPU-hours and storage, stage by stage.

Every figure is traced or counted from the configurations of the recipe's models. Hours are FLOPs over a sustained rate; autoencoders,
text encoders, the language model and the judge are left out of them.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selma_ray.errors import SelmaError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.plan import plan_experts
from selma_ray.models.config import SamplingConfig
from selma_ray.plan.beyond import Work, distilled, drawn_in_rounds, render_flops
from selma_ray.prompts.splits import train_count
from selma_ray.run.demands import SERVE
from selma_ray.run.memory import Need, memory_needs, pipeline_weights, traced_training
from selma_ray.run.recipe import Recipe
from selma_ray.run.stages import STAGES
from selma_ray.run.training_memory import VALUE_BYTES, training_memory_parts
from selma_ray.skills import load_skills
from selma_ray.study.plan import plan_study
from selma_ray.study.study import Study

if TYPE_CHECKING:  # what it needs loads torch, which the command line does not
    from selma_ray.models.cost import TrainingCost

__all__ = ["SUSTAINED_TFLOPS", "Plan", "StagePlan", "plan_recipe", "study_hours", "training_memory_bytes"]

SUSTAINED_TFLOPS = 28.0
"""TFLOP/s that SELMA's 6 hours an expert on an L40 come to (5,000 steps of 64 images of 512 px on Stable Diffusion 1.4).

Its 12 hours for SDXL come to 114, so larger models take less than the plan says.
"""

_EVERY_ROUND = ("images", "cache", "experts", "merging")


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes; None where it is not known or not meant."""

    name: str
    memory_bytes: float | None
    """Memory of one process: of rendering the weights alone, of training all that it holds."""
    pflop: float | None
    storage_bytes: float | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe's plan."""

    parameters: dict[str, int]
    """Weights of each part of the model."""
    lora_parameters: int
    """Weights of one expert."""
    stages: tuple[StagePlan, ...]
    needs: tuple[Need, ...] = ()
    """What the processes that have a GPU hold of it."""


def plan_recipe(recipe: Recipe, gpu_bytes: float | None = None) -> Plan:
    """Return the plan of a recipe, on cards of `gpu_bytes` where it is known.

    Raises ModelNotFoundError where its model's configurations cannot be read.
    """
    sampling, lora = recipe.images.largest_sampling, recipe.experts.lora
    cost = traced_training(recipe.model, sampling.height_px, sampling.width_px, lora.rank, lora.targets)
    parameters = pipeline_weights(recipe.model)
    num_skills = len(load_skills(recipe.skills))
    prompts = train_count(recipe.prompts) * num_skills
    images, encoded = prompts * recipe.images.per_prompt, prompts * _encoded_per_prompt(recipe)
    planned = plan_experts([str(number) for number in range(num_skills)], recipe.experts)
    ranks = [max(1, len(expert.experts)) * expert.config.lora.rank / lora.rank for expert in planned]
    learning = sum(each.config.steps * each.config.batch_size * _example_flops(cost, each.config) for each in planned)
    rounds = drawn_in_rounds([each.config for each in planned], cost, sampling)
    distils = recipe.merging.method == "distil"
    student = distilled(recipe.merging.distil, num_skills, cost, sampling) if distils else Work()
    tested = _models_tested(recipe, len(planned))
    weights = sum(parameters.values()) * VALUE_BYTES[recipe.model.dtype]
    stages: tuple[StagePlan, ...] = (
        StagePlan(
            "images", weights, images * render_flops(cost, sampling) / 1e15,
            images * _pixel_bytes(sampling), f"{images:,} images",
        ),
        StagePlan(
            "cache", weights - cost.parameters * VALUE_BYTES[recipe.model.dtype], None, encoded * cost.cached_bytes, "encoders alone"
        ),
        StagePlan(
            "experts", training_memory_bytes(cost, recipe.experts, num_skills if recipe.experts.fused else 1),
            (learning + rounds.flops) / 1e15,
            4 * cost.lora_parameters * (sum(ranks) + 3 * max(ranks) * len(planned) + rounds.adapters)
            + rounds.images * _pixel_bytes(sampling),
            f"{len(planned)} LoRAs, {cost.lora_parameters / 1e6:,.1f} M weights at rank {lora.rank}; storage with checkpoints"
            + (f"; {rounds.images:,} images in rounds" if rounds.images else ""),
        ),
        StagePlan(
            "merging", None, student.flops / 1e15 if distils else None,
            weights + _adapter_bytes(recipe) * cost.lora_parameters * num_skills,
            "adapter, its exports and the baked pipeline" + (f"; {student.images:,} images of a student" if distils else ""),
        ),
        StagePlan(
            "evaluation", weights, tested * render_flops(cost, recipe.evaluation.sampling) / 1e15 if tested else None,
            tested * _pixel_bytes(recipe.evaluation.sampling) if tested else None,
            f"{tested:,} images" if tested else f"suite {recipe.evaluation.suite} cannot be read",
        ),
        StagePlan("serving", weights, None, None),
    )  # fmt: skip
    needs = memory_needs(recipe, [*STAGES, SERVE], gpu_bytes)
    if recipe.rounds > 1:
        stages = tuple(_in_rounds(stage, recipe.rounds) if stage.name in _EVERY_ROUND else stage for stage in stages)
    return Plan(parameters, cost.lora_parameters, stages, tuple(needs))


def _in_rounds(stage: StagePlan, rounds: int) -> StagePlan:
    """Return what a stage takes in all rounds, if none of them is the last one early."""
    return replace(
        stage,
        pflop=None if stage.pflop is None else rounds * stage.pflop,
        storage_bytes=None if stage.storage_bytes is None else rounds * stage.storage_bytes,
        note=f"{stage.note}; {rounds} times in all rounds",
    )


def training_memory_bytes(cost: "TrainingCost", config: ExpertsConfig, experts: int = 1) -> float:
    """Return what a worker holds of a GPU, or of one process on CPUs, with as many `experts` in it."""
    return sum(training_memory_parts(cost, config, experts).values())


def _adapter_bytes(recipe: Recipe) -> int:
    """Return the bytes of a merged weight in all files that hold it: the adapter and its exports."""
    return VALUE_BYTES[recipe.merging.adapter_dtype] + _export_count(recipe) * VALUE_BYTES[recipe.merging.export_dtype]


def _export_count(recipe: Recipe) -> int:
    """Return how many files are exported: a model has either kohya's or ComfyUI's."""
    exports = set(recipe.merging.exports)
    return len(exports) - ({"kohya", "comfyui"} <= exports)


def _encoded_per_prompt(recipe: Recipe) -> int:
    """Return how many of a prompt's images are learnt from, at most."""
    if recipe.experts.dpo:
        return 2
    return recipe.images.selection.keep_best if recipe.images.selection else recipe.images.per_prompt


def _example_flops(cost: "TrainingCost", config: ExpertsConfig) -> float:
    """Return what an example of a step takes: of a pair, both images, each under the base model too; in rounds the old adapter's too."""
    if config.dpo:
        return 2 * (cost.step_flops + cost.forward_flops)
    return cost.step_flops + cost.forward_flops if config.nft else cost.step_flops


def study_hours(study: Study, tflops: float) -> float:
    """Return the GPU-hours of all that a study makes, at a sustained rate of `tflops` TFLOP/s."""
    made, recipe = plan_study(study), study.recipe
    sampling, lora = recipe.images.largest_sampling, recipe.experts.lora
    cost = traced_training(recipe.model, sampling.height_px, sampling.width_px, lora.rank, lora.targets)
    flops = sum(count * render_flops(cost, sampled) for count, sampled in (*made.images, *(made.scored or ())))
    flops += sum(each.steps * each.batch_size * _example_flops(cost, each) for each in made.experts)
    flops += drawn_in_rounds(made.experts, cost, sampling).flops
    flops += sum(distilled(each, made.skills, cost, sampling).flops for each in made.distilled)
    return flops / tflops / 1e12 / 3600


def _models_tested(recipe: Recipe, num_experts: int) -> int | None:
    """Return how many images an evaluation renders, or None where the suite cannot be read."""
    from selma_ray.judging.suites import open_suite

    try:
        prompts = len(open_suite(recipe.evaluation.suite, recipe.evaluation.max_prompts))
    except SelmaError:
        return None
    models = 2 + (num_experts if recipe.evaluation.experts else 0) + len(recipe.evaluation.models)
    return models * prompts * len(recipe.evaluation.seeds)


def _pixel_bytes(sampling: SamplingConfig) -> int:
    return 3 * sampling.width_px * sampling.height_px
