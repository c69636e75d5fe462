"""Small shards are put together, whatever is killed in between."""

from pathlib import Path

import pytest

from selma_ray.errors import StorageError
from selma_ray.images import compaction, shards
from selma_ray.images.compaction import ShardCompactor, compact_shards
from selma_ray.images.shards import (
    drop_duplicates,
    existing_ids,
    image_summary,
    read_images,
    sizes_of_shards,
    write_shards,
)
from selma_ray.storage import RunFolder
from tests.unit.images.test_shards import row, table

IDS = [f"{number:03d}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def split_of(id_: str) -> str:
    return "rejected" if int(id_) % 4 == 3 else "train"


def write_small(folder: RunFolder) -> dict[str, int]:
    written: dict[str, int] = {}
    for id_ in IDS:
        skill = "one" if int(id_) < 8 else "two"
        written |= write_shards(folder, table(row(id_, skill, split=split_of(id_))))
    return written


def rows_of(folder: RunFolder) -> dict[str, str]:
    rows = [row for skill in ("one", "two") for row in read_images(folder, skill).to_pylist()]
    assert len(rows) == len(IDS)
    return {row["id"]: row["split"] for row in rows}


def test_a_finished_stream_has_one_shard_of_each_skill_and_split(folder: RunFolder) -> None:
    write_small(folder)
    before = image_summary(folder, ["one", "two"])
    assert compact_shards(folder) == len(IDS) - 1  # the only one of its kind is left alone
    assert rows_of(folder) == {id_: split_of(id_) for id_ in IDS}
    assert len(sizes_of_shards(folder)) == 4
    assert image_summary(folder, ["one", "two"]) == before
    assert compact_shards(folder) == 0


def test_large_shards_are_left_alone(folder: RunFolder) -> None:
    written = write_small(folder)
    size_bytes = max(written.values())
    compact_shards(folder, shard_bytes=2 * size_bytes)
    sizes_bytes = sizes_of_shards(folder)
    assert 4 < len(sizes_bytes) < len(IDS)
    assert rows_of(folder) == {id_: split_of(id_) for id_ in IDS}


def test_a_writer_puts_its_own_shards_together_as_they_come(folder: RunFolder) -> None:
    compactor = ShardCompactor(folder, shard_bytes=3 * min(write_small(RunFolder(folder.uri + "-other")).values()))
    most = 0
    for id_ in IDS:
        compactor.add(write_shards(folder, table(row(id_, split=split_of(id_)))))
        most = max(most, len(sizes_of_shards(folder)))
    assert most == 6
    assert len(sizes_of_shards(folder)) == 4
    assert existing_ids(folder) == set(IDS)


def test_what_is_killed_before_the_small_shards_go_is_counted_once_and_cleared_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(folder)
    before = image_summary(folder, ["one", "two"])
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "delete_files", lambda self, paths: None)
        compact_shards(folder)
    assert len(sizes_of_shards(folder)) == len(IDS) + 3
    assert image_summary(folder, ["one", "two"]) == before
    assert existing_ids(folder) == set(IDS)
    assert drop_duplicates(folder) == len(IDS) - 1
    assert rows_of(folder) == {id_: split_of(id_) for id_ in IDS}
    assert len(sizes_of_shards(folder)) == 4


def test_rows_that_are_twice_are_put_together_once(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b")))
    write_shards(folder, table(row("b"), row("c")))
    compact_shards(folder)
    assert read_images(folder, "one")["id"].to_pylist() == ["a", "b", "c"]


def test_a_shard_that_goes_between_listing_and_reading_is_looked_for_anew(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(folder)
    listed = folder.files("images", suffix=".parquet")
    compact_shards(folder)
    files, stale = RunFolder.files, [listed]
    monkeypatch.setattr(
        RunFolder, "files", lambda self, *parts, suffix="": stale.pop() if stale else files(self, *parts, suffix=suffix)
    )
    assert existing_ids(folder) == set(IDS)


def test_a_shard_that_is_there_and_cannot_be_read_is_named(folder: RunFolder) -> None:
    (path,) = write_shards(folder, table(row("a")))
    folder.write_bytes(b"PAR1", path)
    with pytest.raises(StorageError, match=path):
        existing_ids(folder)


def test_much_is_put_together_on_the_cluster(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(compaction, "_IN_PROCESS_BYTES", 100)
    monkeypatch.setattr(compaction, "_on_the_cluster", lambda folder, groups: asked.extend(groups))
    write_small(folder)
    compact_shards(folder)
    assert [len({shards.kind_of_shard(path) for path in paths}) for paths in asked] == [1, 1, 1]
    assert sorted(len(paths) for paths in asked) == [2, 3, 6]
