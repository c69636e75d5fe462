"""What each stage of a recipe takes of the cluster at least: checked before anything runs, and named while a stage waits for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from selma_ray.cluster.placement import Demand, check_fit, shared_resources
from selma_ray.cluster.waiting import announced_waits
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.experts.config import ExpertsConfig
from selma_ray.images.config import ImagesConfig
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.writing.config import QuestionLLMConfig
from selma_ray.progress import Report
from selma_ray.prompts.config import LLMConfig
from selma_ray.run.question_source import is_chosen_later, source_name, splits_judged, writer_of
from selma_ray.run.recipe import Recipe

__all__ = ["SERVE", "check_stages_fit", "stage_demands", "stream_fits_at_once", "waits_announced"]

SERVE = "serve"
"""The service of a run, beside its stages."""


def check_stages_fit(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise ConfigError where one of the stages needs more than a local cluster has, before an earlier one is paid for."""
    for stage in stages:
        for demands, take_turns in stage_demands(recipe, stage):
            check_fit(demands, recipe.cluster, take_turns=take_turns, quiet=True)


def stream_fits_at_once(recipe: Recipe) -> bool:
    """Tell whether the cluster holds the language model and a renderer at once; warns where they take turns."""
    return check_fit(_stream(recipe), recipe.cluster)


@contextmanager
def waits_announced(recipe: Recipe, stage: str, report: Report) -> Iterator[None]:
    """Tell what the block waits for, as long as a cluster that was joined does not have what the stage needs."""
    demands = [demand for together, _ in stage_demands(recipe, stage) for demand in together]
    with announced_waits(demands, recipe.cluster, stage, report):
        yield


def stage_demands(recipe: Recipe, stage: str) -> list[tuple[list[Demand], bool]]:
    """Return what the parts of a stage take that work at once, and whether they may take turns."""
    parts = {"generate": _generate, "train": _train, "merge": _merge, "evaluate": _evaluate, SERVE: _serve}
    return parts[stage](recipe)


def _generate(recipe: Recipe) -> list[tuple[list[Demand], bool]]:
    parts = [(_stream(recipe), True)]
    if source_name(recipe) == "written" and splits_judged(recipe) and (writer := writer_of(recipe).llm):
        parts.append(([Demand("questions.writer.llm", "llm", _engine(writer))], True))
    if is_chosen_later(recipe) and recipe.images.selection:
        parts.append(([Demand("images.selection.judge", "render", _resources(recipe.images.selection.judge))], True))
    return parts


def _stream(recipe: Recipe) -> list[Demand]:
    images, llm = recipe.images, recipe.prompts.llm
    judging = _resources(images.selection.judge) if images.selection and not is_chosen_later(recipe) else {}
    rendering = shared_resources(_resources(images), judging)  # in one process
    demands = [Demand("images.min_renderers", "render", _times(images.min_renderers, rendering))]
    if llm.engine in ("vllm", "free") and recipe.data.prompts != "ground_truth":
        demands.append(Demand("prompts.llm.min_replicas", "llm", _times(llm.min_replicas, _engine(llm))))
    return demands if recipe.data.images == "model" else demands[1:]


def _train(recipe: Recipe) -> list[tuple[list[Demand], bool]]:
    config = recipe.experts
    worker = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    workers = Demand(_worker_key(config), "train", _times(config.workers_per_expert, worker))
    encoders = Demand("experts.encoders", "train", {"CPU": 1, "GPU": 1 if config.gpus_per_worker else 0})
    if nft := config.nft:
        renderer = {"CPU": nft.cpus_per_renderer, "GPU": nft.gpus_per_renderer}
        return [([workers, Demand("experts.nft.renderers", "render", _times(nft.renderers, renderer))], False)]
    parts = [([encoders], True), ([workers], True)]
    if choice := config.selection:
        parts.append(([Demand("experts.selection", "render", {"CPU": choice.num_cpus, "GPU": choice.num_gpus})], True))
    return parts


def _worker_key(config: ExpertsConfig) -> str:
    return f"experts.workers_per_expert x experts.{'gpus' if config.gpus_per_worker else 'cpus'}_per_worker"


def _merge(recipe: Recipe) -> list[tuple[list[Demand], bool]]:
    evaluation, experts, distil = recipe.evaluation, recipe.experts, recipe.merging.distil
    if recipe.merging.method == "distil":
        return [([Demand("merging.distil", "train", {"CPU": distil.num_cpus, "GPU": distil.num_gpus})], True)]
    if recipe.merging.method == "regmean":
        worker = {"CPU": experts.cpus_per_worker, "GPU": experts.gpus_per_worker}
        return [([Demand("experts.cpus_per_worker and experts.gpus_per_worker", "train", worker)], True)]
    if recipe.merging.method != "search":
        return []
    both = shared_resources(_resources(evaluation), _resources(evaluation.judge))
    return [([Demand("evaluation.num_cpus and evaluation.num_gpus", "render", both)], True)]


def _evaluate(recipe: Recipe) -> list[tuple[list[Demand], bool]]:
    evaluation = recipe.evaluation
    rendering, judging = _resources(evaluation), _resources(evaluation.judge)
    if evaluation.judges == 0:
        return [([Demand("evaluation.renderers", "render", shared_resources(rendering, judging))], True)]
    parts = [Demand("evaluation.renderers", "render", rendering), Demand("evaluation.judges", "render", judging)]
    return [(parts, False)]


def _serve(recipe: Recipe) -> list[tuple[list[Demand], bool]]:
    """Return what the replicas take at least: they all stay."""
    serving = recipe.serving
    generators = {"CPU": serving.num_cpus, "GPU": serving.num_gpus}
    evaluators = {"CPU": serving.num_cpus, "GPU": serving.evaluator_num_gpus}
    count = serving.generator_replicas * (1 + len(serving.models))  # each run of serving.models has its own
    key = "serving.generator_replicas" + (" x the runs of serving.models" if serving.models else "")
    parts = [Demand(key, "serve", _times(count, generators))]
    if serving.evaluator_replicas:
        parts.append(Demand("serving.evaluator_replicas", "serve", _times(serving.evaluator_replicas, evaluators)))
    return [(parts, False)]


def _resources(
    settings: ImagesConfig | EvaluationConfig | JudgeConfig | LLMConfig | QuestionLLMConfig,
) -> dict[str, float]:
    return {"CPU": settings.num_cpus, "GPU": settings.num_gpus}


def _engine(llm: LLMConfig | QuestionLLMConfig) -> dict[str, float]:
    return _times(llm.tensor_parallel_size, _resources(llm))


def _times(count: int, resources: Mapping[str, float]) -> dict[str, float]:
    return {name: count * amount for name, amount in resources.items()}
