"""Rendered images as the images stage leaves them in a run's folder."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from selma_ray.records import IMAGE_SCHEMA, content_id
from selma_ray.storage import RunFolder


def write_images(
    folder: RunFolder, skill: str, count: int, shard: int = 0, split: str = "train", size_px: tuple[int, int] = (64, 64)
) -> list[str]:
    """Write one Parquet file of noise images and return its ids."""
    rng = np.random.default_rng(shard)
    ids = [content_id(skill=skill, shard=shard, index=index) for index in range(count)]
    rows = [
        _row(row_id, skill, f"{skill} {index}", split, _png(rng, size_px), size_px) for index, row_id in enumerate(ids)
    ]
    folder.write_table(
        pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), f"images/skill={skill}/part-{shard}-{split}.parquet"
    )
    return ids


def write_scored_images(folder: RunFolder, skill: str, scores: Mapping[str, Sequence[float | None]]) -> None:
    """Write one file of noise images, some of each prompt, as a choice of the best leaves them: one is trained on."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt, of_prompt in scores.items():
        best = max(range(len(of_prompt)), key=lambda index: of_prompt[index] or 0.0)
        for index, score in enumerate(of_prompt):
            row = _row(f"{prompt}-{index}", skill, prompt, "train" if index == best else "rejected", _png(rng))
            rows.append(row | {"image_index": index, "score": score})
    folder.write_table(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), f"images/skill={skill}/scored.parquet")


def write_failed_image(folder: RunFolder, skill: str) -> None:
    """Write one row whose rendering failed."""
    row = _row("failed", skill, "no", "train", None) | {"error": "out of memory"}
    folder.write_table(pa.Table.from_pylist([row], schema=IMAGE_SCHEMA), f"images/skill={skill}/failed.parquet")


def _row(
    row_id: str, skill: str, prompt: str, split: str, png: bytes | None, size_px: tuple[int, int] = (64, 64)
) -> dict[str, Any]:
    return {
        "id": row_id, "skill": skill, "prompt": prompt, "split": split, "image_index": 0, "seed": 0,
        "image": png and {"bytes": png, "path": None}, "model": "tiny", "revision": "0", "scheduler": "DDIMScheduler", "steps": 1,
        "guidance_scale": 1.0, "width": size_px[0], "height": size_px[1], "error": None,
    }  # fmt: skip


def _png(rng: np.random.Generator, size_px: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
