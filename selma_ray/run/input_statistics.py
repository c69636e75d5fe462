"""What each expert's modules are given on its own examples, recorded once for RegMean: one pass over cached examples, a task an expert.

Layout: experts/<skill>/inputs.safetensors, and inputs.json, which says of what it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selma_ray.adapters.files import adapter_digest
from selma_ray.cluster.placement import role_options
from selma_ray.errors import AdapterError
from selma_ray.experts.cache import skill_cache
from selma_ray.local_copies import local_copy
from selma_ray.merging.regmean import InputStatistics, recorded_grams, write_grams
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of, see_own_gpus, task_options
from selma_ray.progress import Progress, Report
from selma_ray.records import content_id, seed_of
from selma_ray.run.opening import Run
from selma_ray.storage import RunFolder

__all__ = ["InputPass", "input_statistics", "record_inputs"]

_WEIGHTS, _INDEX = "inputs.safetensors", "inputs.json"


@dataclass(frozen=True)
class InputPass:
    """One expert's pass; pickles, for the task that makes it."""

    folder: RunFolder
    skill: str
    cache: str
    """Folder of its cached examples, relative to the run's."""
    cache_key: str
    model: ModelConfig
    examples: int
    batch_size: int
    precision: str
    seed: int
    num_cpus: float
    num_gpus: float

    @property
    def directory(self) -> str:
        """Return the expert's folder, relative to the run's."""
        return f"experts/{self.skill}"

    def key(self) -> str:
        """Return a content id of all that decides the inputs."""
        decides = {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "seed": self.seed,
        }
        return content_id(cache=self.cache_key, adapter=adapter_digest(self.folder.path(self.directory)), **decides)

    def is_done(self) -> bool:
        """Tell whether the inputs are there."""
        index = (self.directory, _INDEX)
        return self.folder.exists(*index) and self.folder.read_json(*index)["key"] == self.key()


def input_statistics(run: Run, report: Report) -> InputStatistics:
    """Record what is missing and return all of it; as many passes at once as the cluster holds. Raises AdapterError without examples."""
    import ray

    recipe = run.recipe
    passes = [_pass(run, skill) for skill in run.skill_names]
    missing = [each for each in passes if not each.is_done()]
    options: dict[str, Any] = {
        "num_cpus": recipe.experts.cpus_per_worker,
        **task_options(recipe.experts.gpus_per_worker),
        **role_options("train", recipe.cluster),
    }
    task = ray.remote(**options)(record_inputs)
    pending = [task.remote(each) for each in missing]
    while pending:
        report(Progress("merge", len(passes) - len(pending), len(passes), "inputs of the experts' modules"))
        ready, pending = ray.wait(pending)
        ray.get(ready)
    paths = {each.skill: str(local_copy(run.folder.path(each.directory, _WEIGHTS))) for each in passes}
    return InputStatistics(paths, recipe.merging.regmean.off_diagonal)


def record_inputs(each: InputPass) -> None:
    """Run an expert over its examples, with the loss's own noise, and keep the Gram matrices of what its modules are given."""
    see_own_gpus(each.num_gpus)
    import tempfile

    import torch

    from selma_ray.adapters.files import local_adapter
    from selma_ray.adapters.peft_format import open_adapter
    from selma_ray.experts.examples import EncodedExamples, example_generators
    from selma_ray.experts.precision import resolve_precision
    from selma_ray.models.family import open_family
    from selma_ray.models.parts import DTYPES

    torch.set_num_threads(max(1, int(each.num_cpus)))
    device = device_of(each.num_gpus, "experts.gpus_per_worker")
    family, examples = open_family(each.model), EncodedExamples(each.folder, [each.cache])
    denoiser: Any = family.load_denoiser(DTYPES[resolve_precision(each.precision, device)])
    adapter = open_adapter(local_adapter(each.folder.path(each.directory)))
    _add(denoiser, adapter)
    denoiser.to(device)
    seed = seed_of(each.seed, expert=each.skill, inputs=True)
    with torch.no_grad(), recorded_grams(denoiser, adapter.modules) as grams:
        for step in range(-(-each.examples // each.batch_size)):
            batch = examples.batch(examples.positions(each.batch_size, step, seed))
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            count = len(next(iter(placed.values())))
            family.errors(denoiser, placed, example_generators(step, range(count), seed))
    each.folder.delete(each.directory, _INDEX)
    with tempfile.TemporaryDirectory() as scratch:
        write_grams(Path(scratch, _WEIGHTS), grams)
        each.folder.upload(Path(scratch, _WEIGHTS), each.directory, _WEIGHTS)
    each.folder.write_json({"key": each.key(), "examples": each.examples, "cache": each.cache}, each.directory, _INDEX)


def _add(denoiser: Any, adapter: Any) -> None:
    import torch

    with torch.no_grad():
        for factors in adapter:
            weight = denoiser.get_submodule(factors.module).weight
            weight.copy_(factors.added_to(weight))


def _pass(run: Run, skill: str) -> InputPass:
    recipe, config = run.recipe, run.recipe.experts
    cache = skill_cache(run.folder, skill, recipe.model, in_pairs=config.dpo is not None)
    if not cache.is_complete(run.folder):
        raise AdapterError(
            f"merging.method regmean needs the cached examples of {skill} in {run.folder.path(cache.directory)}; run `selma train` with "
            "an empty experts folder, or take another method"
        )
    return InputPass(
        folder=run.folder,
        skill=skill,
        cache=cache.directory,
        cache_key=cache.key,
        model=recipe.model,
        examples=recipe.merging.regmean.examples,
        batch_size=config.micro_batch_size or config.batch_size // config.workers_per_expert,
        precision=config.precision,
        seed=recipe.seed,
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
    )
