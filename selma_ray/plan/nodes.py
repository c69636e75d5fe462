"""The nodes of a cluster that a recipe can use: for each role the smallest node that holds its processes, and how many of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from selma_ray.cluster.config import Role
from selma_ray.cluster.placement import shared_resources
from selma_ray.experts.plan import plan_experts
from selma_ray.run.demands import SERVE
from selma_ray.run.memory import CUDA_BYTES, Need, memory_needs
from selma_ray.run.question_source import is_chosen_later, source_name, splits_judged, writer_of
from selma_ray.run.recipe import Recipe
from selma_ray.run.stages import STAGES
from selma_ray.skills import load_skills

__all__ = ["NodeGroup", "node_groups"]


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that bear one role's label, as a cluster file has them."""

    role: Role
    cpus: int
    """CPUs of a node."""
    gpus: int
    """GPUs of a node."""
    card_bytes: float | None
    """Memory of each GPU at least; None where the role has none, or nothing is known of its models."""
    fewest: int
    """Nodes without which a stage does not start."""
    most: int
    """Nodes that the recipe can keep busy."""


class _Placed(Protocol):
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class _Processes:
    """Processes of one kind, which stand on one node each."""

    role: Role
    resources: Mapping[str, float]
    """Of one of them: CPU and GPU."""
    fewest: int
    most: int

    @property
    def cpus(self) -> float:
        """Return the CPUs of one of them."""
        return self.resources.get("CPU", 0)

    @property
    def gpus(self) -> float:
        """Return the GPUs of one of them."""
        return self.resources.get("GPU", 0)


def node_groups(recipe: Recipe, gpu_bytes: float | None = None) -> list[NodeGroup]:
    """Return the groups of nodes that the stages and the service of a recipe take; `gpu_bytes` is the memory of a card, if it is known."""
    processes, needs = list(_processes(recipe)), memory_needs(recipe, [*STAGES, SERVE], gpu_bytes)
    roles = dict.fromkeys(each.role for each in processes)
    return [_group(role, [each for each in processes if each.role == role], needs) for role in roles]


def _group(role: Role, processes: list[_Processes], needs: list[Need]) -> NodeGroup:
    gpus = max(math.ceil(each.gpus) for each in processes)
    cpus = max(math.ceil(each.cpus * (gpus // each.gpus if each.gpus else 1)) for each in processes)
    shared = [int(gpus // each.gpus if each.gpus else cpus // each.cpus) for each in processes]  # on one node
    cards = [(need.total_bytes + CUDA_BYTES) / need.share for need in needs if _role(need) == role]
    # A service's replicas all stay; what works for the other roles is of one stage at a time.
    of_kinds = sum if role == "serve" else max
    fewest, most = (
        math.ceil(of_kinds(count / on_node for count, on_node in zip(counts, shared, strict=True)))
        for counts in ([each.fewest for each in processes], [each.most for each in processes])
    )
    return NodeGroup(role, cpus, gpus, max(cards) if cards and gpus else None, fewest, most)


def _role(need: Need) -> Role:
    if need.stage == SERVE:
        return "serve"
    if need.stage == "train":
        return "train"
    return "llm" if "language model" in need.what else "render"


def _processes(recipe: Recipe) -> Iterator[_Processes]:
    yield from _writers(recipe)
    yield from _renderers(recipe)
    experts = recipe.experts
    fitted = len(plan_experts([str(number) for number in range(len(load_skills(recipe.skills)))], experts))
    worker = {"CPU": experts.cpus_per_worker, "GPU": experts.gpus_per_worker}
    at_once = min(fitted, experts.max_concurrent or fitted)
    yield _Processes("train", worker, experts.workers_per_expert, at_once * experts.workers_per_expert)
    serving = recipe.serving
    generator = {"CPU": serving.num_cpus, "GPU": serving.num_gpus}
    fewest, runs = serving.generator_replicas, 1 + len(serving.models)
    yield _Processes("serve", generator, runs * fewest, runs * (serving.max_generator_replicas or fewest))
    if serving.evaluator_replicas:
        evaluator = {"CPU": serving.num_cpus, "GPU": serving.evaluator_num_gpus}
        fewest = serving.evaluator_replicas
        yield _Processes("serve", evaluator, fewest, serving.max_evaluator_replicas or fewest)


def _writers(recipe: Recipe) -> Iterator[_Processes]:
    llm = recipe.prompts.llm
    if llm.engine != "remote" and recipe.data.prompts != "ground_truth":
        engine = {"CPU": llm.num_cpus * llm.tensor_parallel_size, "GPU": llm.num_gpus * llm.tensor_parallel_size}
        yield _Processes("llm", engine, llm.min_replicas, llm.max_replicas)
    if source_name(recipe) == "written" and splits_judged(recipe) and (writer := writer_of(recipe).llm):
        split = writer.tensor_parallel_size
        yield _Processes("llm", {"CPU": writer.num_cpus * split, "GPU": writer.num_gpus * split}, 1, 1)


def _renderers(recipe: Recipe) -> Iterator[_Processes]:
    images, evaluation = recipe.images, recipe.evaluation
    if recipe.data.images == "model":
        judge = images.selection.judge if images.selection and not is_chosen_later(recipe) else None
        yield _Processes("render", _together(images, judge), images.min_renderers, images.max_renderers)
    judge = None if evaluation.judges else evaluation.judge
    yield _Processes("render", _together(evaluation, judge), 1, evaluation.renderers)
    if evaluation.judges:
        yield _Processes("render", _together(evaluation.judge), 1, evaluation.judges)


def _together(*parts: _Placed | None) -> dict[str, float]:
    """Return what one process takes that does the work of several parts in turn."""
    return shared_resources(*({"CPU": part.num_cpus, "GPU": part.num_gpus} for part in parts if part is not None))
