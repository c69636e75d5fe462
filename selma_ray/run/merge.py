"""The experts become one model: by weights of the recipe, by weights that a search finds, or as teachers of a student."""

import time
from typing import Any

from selma_ray.cluster.errors import reason_of
from selma_ray.errors import ConfigError, TrainingError
from selma_ray.merging.config import MergingConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.progress import Progress, Report
from selma_ray.run.opening import Run
from selma_ray.storage import RunFolder

__all__ = ["merge"]

_POLL_S = 1.0
_PROGRESS = "progress.json"


def merge(run: Run, report: Report) -> dict[str, Any]:
    """Merge the experts into one pipeline; returns what merging lost."""
    from selma_ray.merging.run import merge_experts

    recipe = run.recipe
    found = _searched(run, report) if recipe.merging.method == "search" else None
    student = _distilled(run, report) if recipe.merging.method == "distil" else None
    inputs = _inputs(run, report) if recipe.merging.method == "regmean" else None
    report(Progress("merge", 0, 1))
    summary = merge_experts(
        run.folder, run.skill_names, recipe.model, recipe.merging, recipe.seed, found, inputs, student
    )
    report(Progress("merge", 1, 1))
    if recipe.rounds == 1:
        return summary.as_dict()
    from selma_ray.run.rounds import go_rounds

    return {**summary.as_dict(), **go_rounds(run, report)}


def _inputs(run: Run, report: Report) -> Any:
    from selma_ray.run.input_statistics import input_statistics

    return input_statistics(run, report)


def _searched(run: Run, report: Report) -> Any:
    from selma_ray.cluster.placement import shared_resources
    from selma_ray.merging.candidates import search_merge
    from selma_ray.run.dev_scorer import dev_scorer

    recipe, evaluation = run.recipe, run.recipe.evaluation
    search = recipe.merging.search
    resources = shared_resources(
        {"num_cpus": evaluation.num_cpus, "num_gpus": evaluation.num_gpus},
        {"num_cpus": evaluation.judge.num_cpus, "num_gpus": evaluation.judge.num_gpus},
    )
    return search_merge(
        run.folder, recipe.merging, dev_scorer(run, search.suite, search.max_prompts, "merging.search"), resources, recipe.seed,
        recipe.cluster, report,
    )  # fmt: skip


def _distilled(run: Run, report: Report) -> str:
    """Train the student of merging.method distil in a process of its own; returns the place of its adapter."""
    import ray

    from selma_ray.cluster.placement import role_options
    from selma_ray.merging.student_training import student_place
    from selma_ray.models.device import task_options
    from selma_ray.prompts.store import read_prompts

    recipe, distil = run.recipe, run.recipe.merging.distil
    changes: dict[str, Any] = {"guidance_scale": distil.guidance_scale}
    if distil.sampling_steps:
        changes["steps"] = distil.sampling_steps
    prompts = {skill: read_prompts(run.folder, skill, "train")["prompt"].to_pylist() for skill in run.skill_names}
    for skill, texts in prompts.items():
        if not texts:
            raise ConfigError(
                f"merging.method distil needs training prompts of every skill, {skill} has none; raise prompts.per_skill"
            )
    sampling = recipe.images.sampling.model_copy(update=changes)
    arguments = (run.folder, prompts, recipe.model, recipe.merging, sampling, recipe.seed)
    place = student_place(*arguments)  # its errors come before a process starts
    task = ray.remote(_train_student).options(
        num_cpus=distil.num_cpus, **task_options(distil.num_gpus), **role_options("train", recipe.cluster)
    )
    trained = task.remote(*arguments, place, distil.num_cpus)
    while not ray.wait([trained], timeout=_POLL_S)[0]:
        if run.folder.exists(place, _PROGRESS):
            state = run.folder.read_json(place, _PROGRESS)
            report(Progress("merge", state["step"], distil.steps, f"student: loss {state['loss']:.4f}"))
    try:
        student: str = ray.get(trained)
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"the student could not be trained ({reason_of(error)}); run the same command again"
        ) from error
    run.folder.delete(place, _PROGRESS)
    return student


def _train_student(
    folder: RunFolder,
    prompts: Any,
    model: ModelConfig,
    config: MergingConfig,
    sampling: SamplingConfig,
    seed: int,
    place: str,
    num_cpus: float,
) -> str:
    from selma_ray.models.device import see_own_gpus

    see_own_gpus(config.distil.num_gpus)
    import torch

    from selma_ray.merging.student_training import train_student

    torch.set_num_threads(max(1, int(num_cpus)))
    told_s = [0.0]

    def tell(step: int, loss: float) -> None:
        if time.monotonic() - told_s[0] >= _POLL_S:
            told_s[0] = time.monotonic()
            folder.write_json({"step": step, "loss": loss}, place, _PROGRESS)

    return train_student(folder, prompts, model, config, sampling, seed, tell)
