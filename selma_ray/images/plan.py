"""From kept prompts to the images still to be rendered: each with its id and its seed."""

import random
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from selma_ray.config import identity
from selma_ray.images.config import ImagesConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.identity import model_identity
from selma_ray.records import content_id, seed_of

__all__ = ["PLAN_SCHEMA", "PlanImages"]

PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("skill", pa.string()),
        ("prompt", pa.string()),
        ("split", pa.string()),
        ("image_index", pa.int32()),
        ("seed", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


class PlanImages:
    """Plans the images of training prompts; the other splits are never rendered for training."""

    def __init__(self, config: ImagesConfig, model: ModelConfig, seed: int, finished_ids: Collection[str] = ()) -> None:
        self._per_prompt = config.per_prompt
        self._seed = seed
        self._finished_ids = frozenset(finished_ids)
        self._provenance = {"engine": config.engine, "model": model_identity(model)}
        self._samplings = [(sampling, identity(sampling)) for sampling in config.samplings]

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Return a row (PLAN_SCHEMA) for each image of each training prompt that is not finished."""
        rows = [row for prompt in prompts.to_pylist() for row in self._missing(prompt)]
        return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)

    def unfinished(self, prompts: pa.Table) -> pa.Table:
        """Return the prompts that have an image to render."""
        return prompts.filter(pa.array([any(self._missing(prompt)) for prompt in prompts.to_pylist()], pa.bool_()))

    def _missing(self, prompt: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if prompt["split"] != "train":
            return
        sampling, sampling_identity = self._sampling(prompt)
        for image_index in range(self._per_prompt):
            image = {"skill": prompt["skill"], "prompt": prompt["prompt"], "image_index": image_index}
            seed = seed_of(self._seed, **image)
            image_id = content_id(**image, seed=seed, **self._provenance, sampling=sampling_identity)
            if image_id not in self._finished_ids:
                size = {"width": sampling.width_px, "height": sampling.height_px}
                yield {"id": image_id, **image, "split": prompt["split"], "seed": seed, **size}

    def _sampling(self, prompt: dict[str, Any]) -> tuple[SamplingConfig, dict[str, Any]]:
        """Return how a prompt's images are sampled: of one size, so that a judge chooses among, and pairs are made of, alike ones."""
        if len(self._samplings) == 1:
            return self._samplings[0]
        drawn = random.Random(seed_of(self._seed, skill=prompt["skill"], prompt=prompt["prompt"], size=True))
        return drawn.choice(self._samplings)
