import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from selma_ray.errors import RenderError
from selma_ray.images.config import ImagesConfig
from selma_ray.images.shards import (
    check_failures,
    drop_duplicates,
    existing_ids,
    forget_failures,
    image_summary,
    read_images,
    write_shards,
)
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def row(id_: str, skill: str = "one", error: str | None = None, colour: str = "red", split: str = "train") -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return {
        "id": id_, "skill": skill, "prompt": f"prompt of {id_}", "split": split, "image_index": 0, "seed": 7,
        "image": None if error else {"bytes": buffer.getvalue(), "path": f"{id_}.png"}, "model": "tiny",
        "revision": "main", "scheduler": "DDIMScheduler", "steps": 2, "guidance_scale": 7.5, "width": 8, "height": 8,
        "error": error, "score": None,
    }  # fmt: skip


def table(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows))


def test_shards_are_by_skill_and_open_as_images(folder: RunFolder) -> None:
    write_shards(folder, table(row("b", colour="blue"), row("a"), row("c", "two")))
    files = folder.files("images", suffix=".parquet")
    assert [path.split("/")[1] for path in files] == ["skill=one", "skill=two"]
    assert pq.read_schema(folder.local_path(files[0])).equals(IMAGE_SCHEMA, check_metadata=True)
    opened = datasets.load_dataset(
        "parquet", data_files=[str(folder.local_path(path)) for path in files], split="train", cache_dir=folder.uri
    )
    assert isinstance(opened.features["image"], datasets.Image)
    by_id = {entry["id"]: entry for entry in opened}
    assert by_id["b"]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert by_id["c"]["skill"] == "two"
    assert by_id["a"]["guidance_scale"] == 7.5


def test_reading_back_is_sorted_and_complete(folder: RunFolder) -> None:
    write_shards(folder, table(row("c"), row("a")))
    write_shards(folder, table(row("b"), row("x", "two")))
    images = read_images(folder, "one")
    assert images["id"].to_pylist() == ["a", "b", "c"]
    assert images.schema == IMAGE_SCHEMA
    assert existing_ids(folder) == {"a", "b", "c", "x"}
    assert read_images(folder, "three").num_rows == 0


def test_the_same_rows_make_the_same_shard_once(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b")))
    write_shards(folder, table(row("b"), row("a")))
    assert len(folder.files("images")) == 1


def test_failures_are_recorded_counted_and_tried_again(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b", error="ValueError: no"), row("c", error="ValueError: no")))
    assert image_summary(folder, ["one", "two"]) == {
        "rendered": 1,
        "rejected": 0,
        "failed": 2,
        "reasons": {"ValueError: no": 2},
        "skills": {
            "one": {"rendered": 1, "rejected": 0, "failed": 2},
            "two": {"rendered": 0, "rejected": 0, "failed": 0},
        },
    }
    assert existing_ids(folder) == {"a"}
    assert read_images(folder, "one")["id"].to_pylist() == ["a"]
    forget_failures(folder)
    assert image_summary(folder, ["one"])["failed"] == 0
    assert existing_ids(folder) == {"a"}


def test_too_many_failures_name_the_first_reasons(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b", error="ValueError: no")))
    summary = image_summary(folder, ["one"])
    check_failures(summary, ImagesConfig(max_failed_fraction=0.5))
    with pytest.raises(
        RenderError, match=r"max_failed_fraction allows 0.49, 1 of 2 .*1 x ValueError: no.*same command"
    ):
        check_failures(summary, ImagesConfig(max_failed_fraction=0.49))


def test_nothing_rendered_is_no_failure(folder: RunFolder) -> None:
    check_failures(image_summary(folder, ["one"]), ImagesConfig())


def test_rejected_images_are_counted_apart_and_not_tried_again(folder: RunFolder) -> None:
    write_shards(
        folder, table(row("a"), row("b", split="rejected"), row("c", split="rejected", error="ValueError: no"))
    )
    summary = image_summary(folder, ["one"])
    assert (summary["rendered"], summary["rejected"], summary["failed"]) == (1, 2, 0)
    assert existing_ids(folder) == {"a", "b", "c"}


def test_shards_of_an_earlier_version_are_read_with_those_of_this(folder: RunFolder) -> None:
    write_shards(folder, table(row("a")))
    old = folder.read_table(folder.files("images")).drop_columns(["score"])
    folder.write_table(old, "images", "skill=one", "old.parquet")
    assert read_images(folder, "one")["score"].to_pylist() == [None, None]


def test_a_kill_between_shards_leaves_what_was_not_chosen(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is rendered and chosen from again: it must be what was chosen."""
    written: list[str] = []

    def write_table(self: RunFolder, rows: pa.Table, path: str) -> int:
        written.append(rows["split"][0].as_py())
        return 1

    monkeypatch.setattr(RunFolder, "write_table", write_table)
    write_shards(folder, table(row("a"), row("b", split="rejected"), row("c", split="dev")))
    assert written[0] == "rejected"
    assert sorted(written[1:]) == ["dev", "train"]


def test_rows_that_two_starts_wrote_are_kept_once(folder: RunFolder) -> None:
    write_shards(folder, table(row("a"), row("b")))
    write_shards(folder, table(row("b"), row("c")))
    write_shards(folder, table(row("c")))
    write_shards(folder, table(row("x", "two")))
    assert drop_duplicates(folder) == 2
    assert read_images(folder, "one")["id"].to_pylist() == ["a", "b", "c"]
    assert drop_duplicates(folder) == 0
    assert existing_ids(folder) == {"a", "b", "c", "x"}
