"""What each process of a recipe holds of one GPU's memory, and whether that fits: known before anything is loaded.

Figures are counted from configurations: weights, what a prediction and a decoded image hold, optimiser and activations, and the
key-value cache of one request. Judges of transformers are left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from selma_ray.cluster.cards import smallest_gpu_bytes
from selma_ray.config import apply_overrides, validate
from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.experts.config import NftConfig
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.writing.config import QuestionLLMConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.prompts.config import LLMConfig
from selma_ray.run.demands import SERVE, stage_demands
from selma_ray.run.question_source import is_chosen_later, source_name, splits_judged, writer_of
from selma_ray.run.recipe import Recipe
from selma_ray.run.served_weights import adapter_parameters, hosted_recipes
from selma_ray.run.training_memory import VALUE_BYTES, student_memory_parts, training_memory_parts
from selma_ray.serving.config import ServingConfig

if TYPE_CHECKING:  # what it needs loads torch, which the command line does not
    from selma_ray.models.cost import TrainingCost
    from selma_ray.models.memory import DrawingCost

__all__ = [
    "CUDA_BYTES",
    "Need",
    "check_cards",
    "check_memory",
    "memory_needs",
    "pipeline_weights",
    "traced_training",
]

CUDA_BYTES = 1e9
"""What CUDA itself and the allocator's gaps take of a card in a process, roughly."""

_VLLM_SHARE = 0.9
_GB = 1e9


@dataclass(frozen=True)
class Need:
    """What one process holds of a GPU."""

    stage: str
    what: str
    parts: Mapping[str, float]
    """Bytes by what they are for."""
    remedies: tuple[str, ...] = ()
    """Overrides that make it smaller, each upon the ones before it."""
    otherwise: str = "take a smaller model or a larger GPU"
    """What else helps."""
    share: float = 1.0
    """Share of the card that it may take."""

    @property
    def total_bytes(self) -> float:
        """Return what it holds in all."""
        return sum(self.parts.values())

    def fits(self, gpu_bytes: float) -> bool:
        """Tell whether it fits a card."""
        return self.total_bytes + CUDA_BYTES <= self.share * gpu_bytes


def check_cards(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise ConfigError where a process of a stage cannot fit the smallest GPU of the connected cluster; does nothing without GPUs."""
    demands = [demand for stage in stages for together, _ in stage_demands(recipe, stage) for demand in together]
    if not any(demand.resources.get("GPU") for demand in demands):
        return
    gpu_bytes = smallest_gpu_bytes(recipe.cluster)
    if gpu_bytes is not None:
        check_memory(recipe, stages, gpu_bytes)


def check_memory(recipe: Recipe, stages: Sequence[str], gpu_bytes: float) -> None:
    """Raise ConfigError where a process of a stage cannot fit a GPU, naming the keys that make it fit.

    A model without a configuration at hand is not counted.
    """
    for need in memory_needs(recipe, stages, gpu_bytes):
        if not need.fits(gpu_bytes):
            parts = ", ".join(f"{name} {amount / _GB:.1f}" for name, amount in need.parts.items())
            raise ConfigError(
                f"{need.stage}: {need.what} needs {need.total_bytes / _GB:.1f} GB ({parts}) and {CUDA_BYTES / _GB:g} for CUDA of "
                f"{need.share * gpu_bytes / _GB:.1f} GB of a GPU; {_remedy(recipe, need, gpu_bytes)}"
            )


def memory_needs(recipe: Recipe, stages: Sequence[str], gpu_bytes: float | None = None) -> list[Need]:
    """Return what the processes of stages hold that have a GPU; a judge beside a renderer takes a share of a card of `gpu_bytes`."""
    parts = {"generate": _generate, "train": _train, "merge": _merge, "evaluate": _evaluate, SERVE: _serve}
    return [need for stage in stages for need in parts[stage](recipe, gpu_bytes)]


def _remedy(recipe: Recipe, need: Need, gpu_bytes: float) -> str:
    """Return the fewest of a need's overrides under which it fits: one alone, or the first ones together."""
    alone = [(override,) for override in need.remedies]
    together = [need.remedies[:count] for count in range(2, len(need.remedies) + 1)]
    for overrides in (*alone, *together):
        try:
            changed = validate(Recipe, apply_overrides(recipe.model_dump(), overrides), source="the recipe")
        except ConfigError:
            continue
        after = [each for each in memory_needs(changed, [need.stage], gpu_bytes) if each.what == need.what]
        if all(each.fits(gpu_bytes) for each in after):
            return f"set {' '.join(overrides)}"
    return need.otherwise


def _generate(recipe: Recipe, gpu_bytes: float | None) -> Iterator[Need]:
    images, llm = recipe.images, recipe.prompts.llm
    if llm.engine == "vllm" and llm.num_gpus and recipe.data.prompts == "llm":
        share = llm.engine_options.get("gpu_memory_utilization", _VLLM_SHARE)
        yield from _engine("generate", "the language model", "prompts.llm", llm, share)
    if source_name(recipe) == "written" and splits_judged(recipe) and (writer := writer_of(recipe).llm):
        yield from _engine("generate", "the questions' language model", "questions.writer.llm", writer, _VLLM_SHARE)
    beside = images.selection.judge if images.selection and not is_chosen_later(recipe) else None
    if images.num_gpus and images.engine == "diffusers" and recipe.data.images == "model":
        model = recipe.data.model or recipe.model
        remedies = ("images.batch_size=1", f"{'data.model' if recipe.data.model else 'model'}.card.offload=model")
        yield _renderer("generate", model, images.largest_sampling, images.batch_size, beside, gpu_bytes, remedies)
    if images.selection:
        yield from _judge("generate", "images.selection.judge", images.selection.judge)


def _train(recipe: Recipe, gpu_bytes: float | None) -> Iterator[Need]:
    config, sampling = recipe.experts, recipe.images.largest_sampling
    if config.nft and config.nft.gpus_per_renderer:
        yield _rounds_renderer(recipe, config.nft, gpu_bytes)
    if not config.gpus_per_worker:
        return
    cost, parameters = _training_cost(recipe)
    width = VALUE_BYTES[recipe.model.dtype]
    encoders = sum(parameters.values()) - cost.parameters
    yield Need(
        "train", "an encoder", {"weights": encoders * width, "an image": _drawing(recipe.model, sampling).decode_bytes}
    )
    yield Need(
        "train",
        "the experts' worker" if config.fused else "an expert's worker",
        training_memory_parts(cost, config, len(recipe.skills) if config.fused else 1),
        ("experts.gradient_checkpointing=true", "experts.micro_batch_size=1", "experts.base_weights=nf4"),
    )
    if config.selection and config.selection.num_gpus:
        yield _scoring("train", recipe, gpu_bytes)


def _rounds_renderer(recipe: Recipe, nft: NftConfig, gpu_bytes: float | None) -> Need:
    """Return what a renderer of the experts' rounds holds, with the judge that scores for it."""
    sampling = recipe.images.largest_sampling.model_copy(update={"guidance_scale": nft.guidance_scale})
    remedies = ("experts.nft.prompts_per_call=1", "model.card.offload=model")
    batch_size = nft.prompts_per_call * nft.images_per_prompt
    need = _renderer("train", recipe.model, sampling, batch_size, nft.judge, gpu_bytes, remedies)
    if recipe.model.card.offload != "none":  # weights, and what is kept of them, wait outside the card
        return need
    kept = _training_cost(recipe)[0].adapted_parameters * VALUE_BYTES[recipe.model.dtype]
    return replace(need, parts={**need.parts, "weights that an expert is folded into": kept})


def _merge(recipe: Recipe, gpu_bytes: float | None) -> Iterator[Need]:
    if recipe.merging.method == "search" and recipe.evaluation.num_gpus:
        yield _scoring("merge", recipe, gpu_bytes)
    distil = recipe.merging.distil
    if recipe.merging.method == "distil" and distil.num_gpus:
        cost, parameters = _training_cost(recipe)
        width = VALUE_BYTES[recipe.model.dtype]
        parts = student_memory_parts(
            cost, _drawing(recipe.model, recipe.images.largest_sampling), distil, len(recipe.skills),
            recipe.experts.lora.rank, sum(parameters.values()) * width, width,
        )  # fmt: skip
        remedies = ("merging.distil.states_per_image=1", "merging.distil.prompts_per_skill=1")
        yield Need("merge", "the student", parts, remedies)


def _evaluate(recipe: Recipe, gpu_bytes: float | None) -> Iterator[Need]:
    evaluation = recipe.evaluation
    if evaluation.num_gpus:
        yield _scoring("evaluate", recipe, gpu_bytes, beside=evaluation.judges == 0)
    yield from _judge("evaluate", "evaluation.judge", evaluation.judge)


def _scoring(stage: str, recipe: Recipe, gpu_bytes: float | None, *, beside: bool = True) -> Need:
    """Return what a renderer holds whose images a judge scores, in its process unless it has its own."""
    evaluation = recipe.evaluation
    judge = evaluation.judge if beside else None
    remedies = ("evaluation.batch_size=1", "model.card.offload=model")
    return _renderer(stage, recipe.model, evaluation.sampling, evaluation.batch_size, judge, gpu_bytes, remedies)


def _serve(recipe: Recipe, gpu_bytes: float | None) -> Iterator[Need]:
    serving = recipe.serving
    judge = serving.judge if serving.evaluator_replicas and serving.evaluator_num_gpus else None
    if judge:
        yield from _judge(SERVE, "serving.judge", judge.model_copy(update={"num_gpus": serving.evaluator_num_gpus}))
    if not serving.num_gpus:
        return
    beside = judge if serving.num_gpus + serving.evaluator_num_gpus <= 1 else None
    own = _generator(recipe, serving, beside, gpu_bytes)
    others = [_generator(each, serving, None, gpu_bytes) for each in hosted_recipes(serving).values()]
    at_once = max(1, int(1 / serving.num_gpus))  # generators that share a card
    largest = sorted([own, *others] * serving.generator_replicas, key=lambda need: -need.total_bytes)[:at_once]
    yield largest[0] if len(largest) == 1 else _together(largest)


def _generator(recipe: Recipe, serving: ServingConfig, judge: JudgeConfig | None, gpu_bytes: float | None) -> Need:
    """Return what a generator of a run holds, served by a service that may be another run's."""
    remedies = ("serving.max_batch_size=1", "serving.experts=false", "model.card.offload=model")
    sampling = recipe.serving.sampling
    need = _renderer(SERVE, recipe.model, sampling, serving.max_batch_size, judge, gpu_bytes, remedies)
    adapters = sum(adapter_parameters(path) for path in serving.adapters.values()) if recipe.serving is serving else 0
    if not (serving.experts or adapters):
        return need
    cost, _ = _training_cost(recipe)
    experts = len(recipe.skills) * cost.lora_parameters if serving.experts else 0
    width = VALUE_BYTES[recipe.model.dtype]
    parts = {**need.parts, "base and experts": (cost.parameters + experts) * width}
    if adapters:
        parts["adapters"] = adapters * width
    return replace(need, parts=parts)


def _together(needs: Sequence[Need]) -> Need:
    """Return what several processes hold that share a card."""
    parts: dict[str, float] = {}
    for need in needs:
        for name, amount in need.parts.items():
            parts[name] = parts.get(name, 0.0) + amount
    return Need(SERVE, f"{len(needs)} generators on one GPU", parts, needs[0].remedies, "set serving.num_gpus=1")


def _renderer(
    stage: str,
    model: ModelConfig,
    sampling: SamplingConfig,
    batch_size: int,
    judge: JudgeConfig | None,
    gpu_bytes: float | None,
    remedies: Iterable[str],
) -> Need:
    """Return what a pipeline holds that draws batches, and a judge in vLLM beside it."""
    width, cost, card = VALUE_BYTES[model.dtype], _drawing(model, sampling), model.card
    weights = pipeline_weights(model)
    resident = {"none": sum(weights.values()), "model": max(weights.values()), "sequential": 0}[card.offload] * width
    upcasts = cost.upcasts and model.dtype == "fp16"
    decoded = 1 if card.vae_slicing else batch_size
    decoding = decoded * cost.decode_bytes * (4 if upcasts else width) / 4 + (
        2 * cost.autoencoder_parameters if upcasts else 0
    )
    predicting = batch_size * cost.rows(sampling.guidance_scale) * cost.row_bytes * width / 4
    parts = {"weights": resident, "drawing": max(predicting, decoding)}
    if judge and gpu_bytes and _is_in_vllm(judge):
        parts["judge"] = (judge.gpu_memory_fraction or _VLLM_SHARE) * gpu_bytes
    return Need(stage, "a renderer" if stage != SERVE else "a generator", parts, tuple(remedies))


def _judge(stage: str, key: str, judge: JudgeConfig) -> Iterator[Need]:
    if judge.num_gpus and _is_in_vllm(judge):
        yield from _engine(stage, "the judge", key, judge, judge.gpu_memory_fraction or _VLLM_SHARE)


def _is_in_vllm(judge: JudgeConfig) -> bool:
    from selma_ray.judging.judges.opening import judge_engine

    return judge_engine(judge) == "vllm"


def _engine(
    stage: str, what: str, key: str, settings: LLMConfig | QuestionLLMConfig | JudgeConfig, share: float
) -> Iterator[Need]:
    """Yield what vLLM holds at least: the weights and the key-value cache of one request, of each GPU that the model is split over."""
    options = getattr(settings, "engine_options", {})
    if not settings.num_gpus or options.get("quantization"):
        return
    from selma_ray.models.memory import language_model_cost

    try:
        cost = language_model_cost(settings.name, settings.revision)
    except ModelNotFoundError:  # it is checked where it is needed; without a configuration it cannot be counted
        return
    width = 4 if settings.dtype in ("float32", "float") else 2
    split = settings.tensor_parallel_size
    parts = {
        "weights": width * cost.parameters / split,
        "key-value cache": 2 * cost.cache_values_per_token * settings.max_model_len / split,
    }
    otherwise = f"name a smaller model in {key}.name, or split it with {key}.tensor_parallel_size"
    yield Need(stage, what, parts, otherwise=otherwise, share=share)


def _training_cost(recipe: Recipe) -> tuple["TrainingCost", dict[str, int]]:
    """Return what training costs and the weights of each part of the model."""
    sampling, lora = recipe.images.largest_sampling, recipe.experts.lora
    cost = traced_training(recipe.model, sampling.height_px, sampling.width_px, lora.rank, lora.targets)
    return cost, pipeline_weights(recipe.model)


def _drawing(model: ModelConfig, sampling: SamplingConfig) -> "DrawingCost":
    return _traced_drawing(model, sampling.height_px, sampling.width_px)


@lru_cache
def traced_training(
    model: ModelConfig, height_px: int, width_px: int, rank: int, targets: tuple[str, ...]
) -> "TrainingCost":
    """Return `models.cost.training_cost`, traced once; a model that a shipped recipe names needs no network."""
    from selma_ray.models.cost import training_cost
    from selma_ray.models.published import configured

    with configured(model) as there:
        return training_cost(there, height_px, width_px, rank, targets)


@lru_cache
def pipeline_weights(model: ModelConfig) -> dict[str, int]:
    """Return the number of weights of each part of a pipeline, counted once."""
    from selma_ray.models.cost import pipeline_parameters
    from selma_ray.models.published import configured

    with configured(model) as there:
        return pipeline_parameters(there)


@lru_cache
def _traced_drawing(model: ModelConfig, height_px: int, width_px: int) -> "DrawingCost":
    from selma_ray.models.memory import drawing_cost
    from selma_ray.models.published import configured

    with configured(model) as there:
        return drawing_cost(there, height_px, width_px)
