"""Exports of a run's images to the layouts that other trainers read: imagefolder and WebDataset."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from selma_ray.errors import ConfigError
from selma_ray.images.shards import shards_of
from selma_ray.json_lines import json_lines
from selma_ray.storage import RunFolder

__all__ = ["LAYOUTS", "export_images"]

_SAMPLES_PER_SHARD, _BYTES_PER_SHARD = 1000, 1 << 28  # a shard is built in memory


def export_images(
    folder: RunFolder, skills: Sequence[str], layout: str, target: RunFolder, card: str, split: str = "train"
) -> int:
    """Write the images of one split in a layout of LAYOUTS below `target`, with their card; returns how many.

    Rows are in the order of skills and ids, read shard by shard. Raises ConfigError for a target that holds something,
    an unknown layout, or a run without such images.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"--to must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if target.files():
        raise ConfigError(f"{target.uri} must be empty to be exported to; delete it or name another folder with --out")
    count = LAYOUTS[layout](_rows(folder, skills, split), target, split)
    if count == 0:
        raise ConfigError(f"{folder.uri} holds no image of split {split!r} to export; run `selma generate` first")
    target.write_bytes(card.encode(), "README.md")
    return count


def _rows(folder: RunFolder, skills: Sequence[str], split: str) -> Iterator[dict[str, Any]]:
    for skill in skills:
        for path in shards_of(folder, skill):
            rows = folder.read_table([path]).sort_by("id").to_pylist()
            yield from (row for row in rows if row["split"] == split)


def _write_imagefolder(rows: Iterator[dict[str, Any]], target: RunFolder, split: str) -> int:
    """Write <split>/<skill>/<id>.png, its prompt beside it as .txt, and one <split>/metadata.jsonl, which makes the export whole.

    kohya's scripts and ai-toolkit read the captions from the .txt files, `datasets` from the metadata.
    """
    lines = []
    for row in rows:
        name = f"{row['skill']}/{row['image']['path']}"
        target.write_bytes(row["image"]["bytes"], split, *name.split("/"))
        target.write_bytes(row["prompt"].encode(), split, *f"{name.rpartition('.')[0]}.txt".split("/"))
        lines.append({"file_name": name, **_described(row)})
    if lines:
        target.write_bytes(json_lines(lines), split, "metadata.jsonl")
    return len(lines)


def _write_webdataset(rows: Iterator[dict[str, Any]], target: RunFolder, split: str) -> int:
    """Write <split>-000000.tar and on; a sample is an image, its prompt as .txt and where it comes from as .json."""
    count = 0
    for number, samples in enumerate(_shards(rows, _SAMPLES_PER_SHARD, _BYTES_PER_SHARD)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for row in samples:
                extension = row["image"]["path"].rpartition(".")[2]
                _add(archive, f"{row['id']}.{extension}", row["image"]["bytes"])
                _add(archive, f"{row['id']}.txt", row["prompt"].encode())
                _add(archive, f"{row['id']}.json", json.dumps(_described(row), ensure_ascii=False).encode())
        target.write_bytes(buffer.getbuffer(), f"{split}-{number:06d}.tar")
        count += len(samples)
    return count


LAYOUTS: dict[str, Callable[[Iterator[dict[str, Any]], RunFolder, str], int]] = {
    "imagefolder": _write_imagefolder,
    "webdataset": _write_webdataset,
}


def _described(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's columns without its image."""
    return {name: value for name, value in row.items() if name not in ("image", "error")}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stays 0, so that the same images make the same bytes
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _shards(rows: Iterator[dict[str, Any]], samples: int, size_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in groups of so many samples, or fewer where their images come to so many bytes."""
    shard: list[dict[str, Any]] = []
    held_bytes = 0
    for row in rows:
        shard.append(row)
        held_bytes += len(row["image"]["bytes"])
        if len(shard) == samples or held_bytes >= size_bytes:
            yield shard
            shard, held_bytes = [], 0
    if shard:
        yield shard
