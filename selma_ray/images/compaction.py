"""Small shards become large ones, while the stream runs and at its end, so that a million images are not as many files to open.

A large shard is written whole before the small ones it replaces go. Whatever is killed in between leaves rows twice, never none;
readers count ids, and `drop_duplicates` clears up.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selma_ray.cluster.errors import reason_of
from selma_ray.errors import StorageError
from selma_ray.images.shards import kind_of_shard, replace_shards, sizes_of_shards
from selma_ray.storage import RunFolder

__all__ = ["SHARD_BYTES", "ShardCompactor", "compact_shards"]

SHARD_BYTES = 256 * 1024 * 1024
"""Size that shards grow to; one of half of it is left alone."""

_IN_PROCESS_BYTES = 64 * 1024 * 1024  # less than this is done before a worker has started


@dataclass
class _Small:
    paths: list[str] = field(default_factory=list)
    size_bytes: int = 0


class ShardCompactor:
    """Puts the shards of one writer together as they come to `SHARD_BYTES`; no other writer knows them, so none is in the way."""

    def __init__(self, folder: RunFolder, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._small: defaultdict[str, _Small] = defaultdict(_Small)

    def add(self, written: Mapping[str, int]) -> None:
        """Take the sizes in bytes of shards that were written, by path."""
        for path, size_bytes in written.items():
            small = self._small[kind_of_shard(path)]
            if path in small.paths:  # written again, with the same rows
                continue
            small.paths.append(path)
            small.size_bytes += size_bytes
            if small.size_bytes >= self._shard_bytes:
                replace_shards(self._folder, small.paths)
                del self._small[kind_of_shard(path)]


def compact_shards(folder: RunFolder, shard_bytes: int = SHARD_BYTES) -> int:
    """Put together what small shards a finished stream left, on the cluster where it is much; returns how many shards there were.

    For when nothing writes images. Raises StorageError where one cannot be read or written.
    """
    groups = _groups(sizes_of_shards(folder), shard_bytes)
    put_together = _on_the_cluster if sum(group.size_bytes for group in groups) > _IN_PROCESS_BYTES else _here
    put_together(folder, [group.paths for group in groups])
    return sum(len(group.paths) for group in groups)


def _here(folder: RunFolder, groups: Sequence[Sequence[str]]) -> None:
    for paths in groups:
        replace_shards(folder, paths)


def _on_the_cluster(folder: RunFolder, groups: Sequence[Sequence[str]]) -> None:
    import ray

    put_together = ray.remote(replace_shards)
    try:
        ray.get([put_together.remote(folder, paths) for paths in groups])
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"shards of {folder.uri} could not be put together ({reason_of(error)}); fix the cause and run the same command again"
        ) from error


def _groups(sizes_bytes: Mapping[str, int], shard_bytes: int) -> list[_Small]:
    """Return small shards of one kind each, in groups that make a large one; a shard without company is left alone."""
    groups: list[_Small] = []
    open_groups: dict[str, _Small] = {}
    for path, size_bytes in sizes_bytes.items():
        if size_bytes >= shard_bytes // 2:
            continue
        kind = kind_of_shard(path)
        group = open_groups.get(kind)
        if group is None or group.size_bytes >= shard_bytes:
            group = open_groups[kind] = _Small()
            groups.append(group)
        group.paths.append(path)
        group.size_bytes += size_bytes
    return [group for group in groups if len(group.paths) > 1]
