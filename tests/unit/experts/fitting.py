"""Small jobs whose images are encoded, and their training in this process; a process group must be up."""

from typing import Any

import torch
from safetensors.torch import load_file

from selma_ray.adapters.config import LoraSettings
from selma_ray.experts.cache import EncodeExamples, encode_here, skill_cache
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.rendered_images import write_images

BASE = ExpertsConfig(
    lora=LoraSettings(rank=4, alpha=4),
    steps=6,
    batch_size=4,
    learning_rate=5e-3,
    warmup_steps=2,
    schedule="cosine",
    precision="fp32",
)


def encoded_job(
    folder: RunFolder, model: ModelConfig, name: str, config: ExpertsConfig, skill: str = "counting"
) -> ExpertJob:
    """Return a job whose images, seven where there are none, are encoded."""
    if not folder.files("images", f"skill={skill}"):
        write_images(folder, skill, 7)
    cache = skill_cache(folder, skill, model, in_pairs=config.dpo is not None)
    if not cache.is_complete(folder):
        encode_here(folder, cache, EncodeExamples(folder, model, cache.ids), empty_caption=True)
    return ExpertJob(name, folder, (cache.directory,), (cache.key,), model, config, seed=0)


def fit(job: ExpertJob, stop_at: int | None = None, start_from: str | None = None, save_to: str | None = None) -> Any:
    """Train up to a step, from a checkpoint or from the start; leave a checkpoint or the adapter."""
    from selma_ray.experts.trainer import ExpertTrainer

    trainer = ExpertTrainer(job)
    if start_from:
        trainer.load(start_from)
    while trainer.steps_done < (stop_at or job.config.steps):
        trainer.step()
    if save_to:
        trainer.save(save_to)
    else:
        trainer.export(seconds=1.0)
    return trainer


def adapter(job: ExpertJob) -> dict[str, torch.Tensor]:
    """Return the weights that training left."""
    return load_file(job.folder.local_path(job.directory, "adapter_model.safetensors"))


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Compare two adapters exactly."""
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
