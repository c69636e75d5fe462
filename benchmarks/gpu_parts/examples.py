"""Encoded examples of random numbers, in the shapes of a family's, as the encoding stage leaves them in a run's folder."""

import json

import torch
from safetensors.torch import save

from benchmarks.gpu_parts.pipelines import Subject
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob
from selma_ray.models.family import Batch, open_family
from selma_ray.storage import RunFolder

__all__ = ["CAPTIONS", "random_batch", "random_job"]

CAPTIONS = ("two blue bananas", "a red ball left of a cup", "a cat", "three green apples on a table")
_EXAMPLES = 4
_CACHE = "cache/random/counting"


def random_batch(subject: Subject, count: int) -> Batch:
    """Return examples on the CPU, N first."""
    generator = torch.Generator().manual_seed(0)
    shapes = open_family(subject.model).example_shapes(subject.sampling.height_px, subject.sampling.width_px)
    batch = {name: torch.randn((count, *shape), generator=generator) for name, shape in shapes.items()}
    return batch | {"latent_std": batch["latent_std"].abs() / 10}


def random_job(subject: Subject, config: ExpertsConfig, folder: RunFolder) -> ExpertJob:
    """Return a job that fits an expert to random examples, which are written where they are not."""
    if not folder.exists(_CACHE, "index.json"):
        ids, shard = [f"example {number}" for number in range(_EXAMPLES)], f"{_CACHE}/part.safetensors"
        content = save(dict(random_batch(subject, _EXAMPLES)), metadata={"ids": json.dumps(ids)})
        folder.write_bytes(content, shard)
        folder.write_json({"shards": [shard], "ids": ids, "pairs": []}, _CACHE, "index.json")
    return ExpertJob("counting", folder, (_CACHE,), ("random",), subject.model, config, seed=0)
