"""From kept prompts to the images still to be rendered: each with its id and its seed."""

import random
from collections.abc import Collection
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
        self._samplings = config.samplings

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Return a row (PLAN_SCHEMA) for each image of each training prompt that is not finished."""
        rows = [
            self._row(prompt, image_index)
            for prompt in prompts.to_pylist()
            if prompt["split"] == "train"
            for image_index in range(self._per_prompt)
        ]
        return pa.Table.from_pylist([row for row in rows if row["id"] not in self._finished_ids], schema=PLAN_SCHEMA)

    def _row(self, prompt: dict[str, Any], image_index: int) -> dict[str, Any]:
        image = {"skill": prompt["skill"], "prompt": prompt["prompt"], "image_index": image_index}
        seed, sampling = seed_of(self._seed, **image), self._sampling(prompt)
        return {
            "id": content_id(**image, seed=seed, **self._provenance, sampling=identity(sampling)),
            **image,
            "split": prompt["split"],
            "seed": seed,
            "width": sampling.width_px,
            "height": sampling.height_px,
        }

    def _sampling(self, prompt: dict[str, Any]) -> SamplingConfig:
        """Return how a prompt's images are sampled: of one size, so that a judge chooses among, and pairs are made of, alike ones."""
        drawn = random.Random(seed_of(self._seed, skill=prompt["skill"], prompt=prompt["prompt"], size=True))
        return drawn.choice(self._samplings)
