"""The encoded-example cache: latents and text embeddings, computed once by Ray Data before any expert trains.

Layout: cache/<key>/<skill>/<shard>.safetensors, one for each row group of the images' files, then cache/<key>/<skill>/index.json
when every shard is there. The key names the model's content, its precision and the exact rows or pairs of rows, so a cache of other
images or of another model has another key and is never read.
"""

import io
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.placement import role_options
from selma_ray.errors import TrainingError
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.layout import EMPTY_CAPTION
from selma_ray.experts.preferences import preference_pairs
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of, see_own_gpus
from selma_ray.models.identity import model_identity
from selma_ray.records import content_id
from selma_ray.storage import READERS, RunFolder

__all__ = ["EncodeExamples", "SkillCache", "encode_caches", "encode_here", "skill_cache"]

logger = logging.getLogger(__name__)

_DECODED = 32  # images in memory at once

_LAYOUT = 2  # raise it whenever what a shard holds changes, so that older caches are not read


@dataclass(frozen=True)
class SkillCache:
    """Where the encoded examples of one skill lie, and which images they come from."""

    skill: str
    key: str
    sources: tuple[tuple[str, int], ...]
    """Files of images, each with one of its row groups: what is encoded at a time, and makes a shard."""
    ids: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    """Ids of the chosen and the rejected image of each preference; none where images are learnt one by one."""

    @property
    def directory(self) -> str:
        """Return the cache's folder, relative to the run's."""
        return f"cache/{self.key}/{self.skill}"

    @property
    def items(self) -> list[dict[str, Any]]:
        """Return what `EncodeExamples` takes for each shard: its path, and the images that it holds the examples of."""
        return [
            {
                "source": path,
                "row_group": group,
                "shard": f"{self.directory}/{PurePosixPath(path).stem}-{group:04d}.safetensors",
            }
            for path, group in self.sources
        ]

    def is_complete(self, folder: RunFolder) -> bool:
        """Tell whether every shard was written."""
        return folder.exists(self.directory, "index.json")

    def write_index(self, folder: RunFolder) -> None:
        """Record that every shard was written."""
        shards = [item["shard"] for item in self.items]
        folder.write_json({"shards": shards, "ids": self.ids, "pairs": self.pairs}, self.directory, "index.json")


def skill_cache(folder: RunFolder, skill: str, model: ModelConfig, *, in_pairs: bool = False) -> SkillCache:
    """Return the cache that belongs to a skill's rendered training images, or to its preferences `in_pairs`.

    Raises TrainingError where there are none.
    """
    files = folder.files("images", f"skill={skill}", suffix=".parquet")
    pairs = _pairs(folder, skill, files) if in_pairs else ()
    paired = {row_id for pair in pairs for row_id in pair} if in_pairs else None
    with ThreadPoolExecutor(READERS) as readers:
        by_file = list(readers.map(lambda file: _rows_by_group(folder, file, paired), files))
    sources = [(file, group) for file, groups in zip(files, by_file, strict=True) for group in groups]
    ids = [row_id for *_, row_id in sorted(row for groups in by_file for rows in groups.values() for row in rows)]
    if not ids:
        raise TrainingError(
            f"skill {skill} has no rendered training image in {folder.path('images')}; run `selma generate` first"
        )
    named = {"pairs": pairs} if in_pairs else {"ids": ids}
    key = content_id(layout=_LAYOUT, model=model_identity(model), **named)
    return SkillCache(skill, key, tuple(sources), tuple(ids), tuple(pairs))


def encode_caches(
    folder: RunFolder, caches: Sequence[SkillCache], model: ModelConfig, config: ExpertsConfig, cluster: ClusterConfig
) -> None:
    """Encode whatever shards are missing with a pool of actors, then write the index of each finished cache."""
    unfinished = [cache for cache in caches if not cache.is_complete(folder)]
    items = [item for cache in unfinished for item in _missing(folder, cache)]
    if config.caption_dropout:
        items += [item for item in map(_empty_caption, caches) if not folder.exists(item["shard"])]
    if items:
        _encode(items, _all_ids(unfinished), folder, model, config, cluster)
    for cache in unfinished:
        cache.write_index(folder)


def encode_here(folder: RunFolder, cache: SkillCache, encode: "EncodeExamples", *, empty_caption: bool = False) -> None:
    """Encode a whole cache in this process, with the empty caption where asked for, and write its index."""
    items = [*cache.items, *([_empty_caption(cache)] if empty_caption else [])]
    encode({name: np.array([item[name] for item in items]) for name in items[0]})
    cache.write_index(folder)


class EncodeExamples:
    """Turns row groups of files of rendered images into shards of encoded examples; one autoencoder and text encoder per actor.

    Of a row group, the rows in `ids` are encoded; default: those to train on.
    """

    def __init__(
        self, folder: RunFolder, model: ModelConfig, ids: Collection[str] | None = None, num_gpus: float = 0
    ) -> None:
        see_own_gpus(num_gpus)
        from selma_ray.models.family import open_family

        self._folder = folder
        self._ids = ids
        self._encoders = open_family(model).load_encoders(device_of(num_gpus, "experts.gpus_per_worker"))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Encode `row_group` of each file `source` into the safetensors `shard`; returns the shards and their numbers of examples.

        The source "" stands for an example without a caption.
        """
        counts = [
            self._encode(str(source), int(group), str(shard))
            for source, group, shard in zip(batch["source"], batch["row_group"], batch["shard"], strict=True)
        ]
        return {"shard": list(batch["shard"]), "examples": counts}

    def _encode(self, source: str, row_group: int, shard: str) -> int:
        from safetensors.torch import save

        from selma_ray.models.conditions import stacked

        if not source:
            self._folder.write_bytes(save(self._encoders.encode_no_caption()), shard)
            return 0
        rows = _rows_to_encode(self._folder.read_row_group(source, row_group), self._ids).to_pylist()
        parts = [self._encode_rows(rows[first : first + _DECODED]) for first in range(0, len(rows), _DECODED)]
        tensors = {name: tensor.contiguous() for name, tensor in stacked(parts).items()}
        ids = json.dumps([row["id"] for row in rows])
        self._folder.write_bytes(save(tensors, metadata={"ids": ids}), shard)
        return len(rows)

    def _encode_rows(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the examples of images of one size."""
        from PIL import Image

        images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
        height_px, width_px = images[0].shape[:2]
        prompts = [row["prompt"] for row in rows]
        return self._encoders.encode_images(np.stack(images)) | self._encoders.encode_prompts(
            prompts, height_px, width_px
        )


def _encode(
    items: list[dict[str, Any]],
    ids: frozenset[str],
    folder: RunFolder,
    model: ModelConfig,
    config: ExpertsConfig,
    cluster: ClusterConfig,
) -> None:
    import ray.data
    import ray.exceptions

    num_gpus = 1 if config.gpus_per_worker else 0
    logger.info("encoding the images of %d shards", len(items))
    encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        EncodeExamples,
        fn_constructor_args=(folder, model, ids, num_gpus),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(config.encoders, len(items))),
        num_cpus=1,
        num_gpus=num_gpus,
        **role_options("train", cluster),
    )
    try:
        examples = sum(row["examples"] for row in encoded.iter_rows())
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"images could not be encoded ({reason_of(error)}); fix the cause and run the same command again"
        ) from error
    logger.info("encoded %d examples", examples)


def _all_ids(caches: Sequence[SkillCache]) -> frozenset[str]:
    return frozenset(row_id for cache in caches for row_id in cache.ids)


def _pairs(folder: RunFolder, skill: str, sources: Sequence[str]) -> list[tuple[str, str]]:
    columns = ["id", "prompt", "split", "error", "score"]
    rows = folder.read_table(list(sources), columns=columns).to_pylist() if sources else []
    pairs = preference_pairs(rows)
    if rows and not pairs:
        raise TrainingError(
            f"skill {skill} has no prompt whose images differ in score, of {len({row['prompt'] for row in rows})}; "
            "raise images.per_prompt, take another images.selection.judge, or leave experts.dpo out"
        )
    return pairs


def _empty_caption(cache: SkillCache) -> dict[str, Any]:
    """Return the item of the example without a caption."""
    return {"source": "", "row_group": 0, "shard": f"{cache.directory}/{EMPTY_CAPTION}"}


def _missing(folder: RunFolder, cache: SkillCache) -> list[dict[str, Any]]:
    """Return the items of a cache whose shards are not written yet."""
    there = set(folder.files(cache.directory))
    return [item for item in cache.items if item["shard"] not in there]


def _rows_by_group(folder: RunFolder, file: str, ids: Collection[str] | None) -> dict[int, list[tuple[str, int, str]]]:
    """Return what orders the examples of a file, by its row groups: prompt, index, id; groups without examples are left out.

    Training sees examples in the same order whatever their images' ids are.
    """
    groups = folder.row_groups(file, ["id", "prompt", "image_index", "split", "error"])
    found = {number: _rows_to_encode(table, ids).to_pylist() for number, table in enumerate(groups)}
    return {
        number: [(row["prompt"], row["image_index"], row["id"]) for row in rows]
        for number, rows in found.items()
        if rows
    }


def _rows_to_encode(table: pa.Table, ids: Collection[str] | None) -> pa.Table:
    """Return the rows whose id is among `ids`; default: the training images that were rendered."""
    if ids is not None:
        return table.filter(pa.array([row_id in ids for row_id in table["id"].to_pylist()], pa.bool_()))
    return table.filter(pc.and_(pc.equal(table["split"], "train"), pc.is_null(table["error"])))
