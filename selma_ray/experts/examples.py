"""Encoded examples as a trainer sees them: one fixed order of rows, and batches that depend on the seed and the step alone."""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selma_ray.errors import TrainingError
from selma_ray.experts.layout import EMPTY_CAPTION
from selma_ray.local_copies import local_copy
from selma_ray.models.conditions import stacked, trimmed
from selma_ray.order import batch_positions
from selma_ray.records import seed_of
from selma_ray.storage import RunFolder

__all__ = ["BucketTurns", "EncodedExamples", "dropped_captions", "example_generators"]


class EncodedExamples:
    """All encoded examples of an expert, in the order of their prompts; the shards stay on disk, mapped into memory.

    Where a cache holds preferences, an example is a pair of images, named by the chosen one.
    """

    def __init__(self, folder: RunFolder, cache_directories: Sequence[str]) -> None:
        self._shards: list[dict[str, torch.Tensor]] = []
        self._empty_path = folder.path(cache_directories[0], EMPTY_CAPTION)  # there where captions are dropped
        places: dict[str, tuple[int, int]] = {}
        pairs: dict[str, str] = {}
        ordered: list[str] = []
        for directory in cache_directories:
            index = folder.read_json(directory, "index.json")
            pairs |= dict(index.get("pairs", ()))
            ordered += index["ids"]
            for path in index["shards"]:
                ids = self._open(str(local_copy(folder.path(path))))
                places |= {row_id: (len(self._shards) - 1, row) for row, row_id in enumerate(ids)}
        self.ids = list(pairs) or ordered
        self._places = [places[row_id] for row_id in self.ids]
        self._rejected = [places[pairs[row_id]] for row_id in self.ids] if pairs else []
        self._buckets = self._by_size()
        self._turns = BucketTurns([len(bucket) for bucket in self._buckets])

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, batch_size: int, step: int, seed: int) -> list[int]:
        """Return the positions of the global batch of `step`, examples of one size; a function of its arguments alone.

        Sizes take turns by their shares of the examples, and each goes through its own in epochs.
        """
        if len(self._buckets) == 1:
            return batch_positions(len(self), batch_size, step, seed)
        bucket, turn = self._turns.of_step(step)
        of_size = self._buckets[bucket]
        return [of_size[each] for each in batch_positions(len(of_size), batch_size, turn, seed_of(seed, bucket=bucket))]

    def batch(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the examples at `positions`, stacked by name; of pairs, first the chosen and then the rejected images.

        All must have one size, as those of `positions` have.
        """
        places = [of_side[position] for of_side in (self._places, self._rejected) if of_side for position in positions]
        rows = [{name: tensor[row : row + 1] for name, tensor in self._shards[shard].items()} for shard, row in places]
        return trimmed(stacked(rows))

    def without(self, batch: Mapping[str, torch.Tensor], dropped: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return `batch` with the captions of the rows `dropped` replaced by the empty one."""
        if not dropped:
            return dict(batch)
        told = {name: batch[name] for name in self._empty_caption}
        count = len(next(iter(batch.values())))
        empty = {name: tensor.to(told[name].dtype) for name, tensor in self._empty_caption.items()}
        with_empty = stacked([told, empty])  # as the last row
        order = [count if row in dropped else row for row in range(count)]
        return {**batch, **{name: tensor[order] for name, tensor in with_empty.items()}}

    @cached_property
    def _empty_caption(self) -> dict[str, torch.Tensor]:
        return load_file(local_copy(self._empty_path))

    def _by_size(self) -> list[list[int]]:
        """Return the positions of the examples of each size of latents."""
        buckets: dict[tuple[int, ...], list[int]] = {}
        for position, (shard, _) in enumerate(self._places):
            buckets.setdefault(tuple(self._shards[shard]["latent_mean"].shape[1:]), []).append(position)
        return [buckets[size] for size in sorted(buckets)]

    def _open(self, path: str) -> list[str]:
        try:
            with safe_open(path, framework="pt") as shard:
                ids = json.loads(shard.metadata()["ids"])
            self._shards.append(load_file(path))
        except Exception as error:
            raise TrainingError(
                f"{path} must be a whole shard of encoded examples ({error}); delete the folder cache"
            ) from None
        return ids


class BucketTurns:
    """Which bucket each step takes its batch from: always the one that is furthest behind its share of the examples."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts
        self._taken = [0] * len(counts)
        self._turns: list[tuple[int, int]] = []

    def of_step(self, step: int) -> tuple[int, int]:
        """Return the bucket of `step` (0, 1, …) and how many steps before it took that bucket."""
        total = sum(self._counts)
        while len(self._turns) <= step:
            due = [
                (len(self._turns) + 1) * count - total * taken
                for count, taken in zip(self._counts, self._taken, strict=True)
            ]
            bucket = due.index(max(due))
            self._turns.append((bucket, self._taken[bucket]))
            self._taken[bucket] += 1
        return self._turns[step]


def example_generators(step: int, positions_in_batch: Sequence[int], seed: int) -> list[torch.Generator]:
    """Return one generator for each place in the global batch of `step`, however the batch is split over workers."""
    return [torch.Generator().manual_seed(seed_of(seed, step=step, place=place)) for place in positions_in_batch]


def dropped_captions(step: int, positions_in_batch: Sequence[int], seed: int, share: float) -> list[int]:
    """Return the rows of a part of the global batch of `step` whose caption is dropped, each with probability `share`."""
    return [
        row
        for row, place in enumerate(positions_in_batch)
        if share and random.Random(seed_of(seed, step=step, place=place, dropout=True)).random() < share
    ]
