"""A contact sheet: random images of every skill with their prompts, as one HTML page or one PNG."""

import html
import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.images.shards import shards_of
from selma_ray.pictures import file_uri, picture_grid, png_bytes
from selma_ray.storage import RunFolder

__all__ = ["contact_sheet", "random_rows"]

_CELL_PX = 128
_STYLE = (
    "body{font:14px sans-serif;margin:24px}.row{display:flex;flex-wrap:wrap;gap:12px}"
    "figure{margin:0;width:160px}img{width:160px;image-rendering:pixelated}figcaption{font-size:12px;color:#444}"
)


def contact_sheet(folder: RunFolder, skills: Sequence[str], per_skill: int, seed: int, suffix: str) -> bytes:
    """Return the sheet as `.html` or `.png`; raises ConfigError for another suffix or a run without images."""
    if suffix not in (".html", ".png"):
        raise ConfigError(f"a contact sheet must be named .html or .png, got {suffix!r}; fix --out")
    rows = {skill: random_rows(folder, skill, per_skill, seed) for skill in skills}
    if not any(rows.values()):
        raise ConfigError(f"{folder.uri} holds no image yet; run `selma generate` first")
    return _page(rows).encode() if suffix == ".html" else _picture(rows)


def random_rows(folder: RunFolder, skill: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `count` random rows of a skill that have images; of the shards, only those with chosen rows are read whole."""
    places = [
        (path, index)
        for path in shards_of(folder, skill)
        for index, error in enumerate(folder.read_table([path], columns=["error"])["error"].to_pylist())
        if error is None
    ]
    chosen = random.Random(f"{seed} {skill}").sample(places, min(count, len(places)))
    tables = {path: folder.read_table([path]) for path in {path for path, _ in chosen}}
    return [tables[path].slice(index, 1).to_pylist()[0] for path, index in chosen]


def _page(rows: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    sections = "".join(
        f"<h2>{html.escape(skill)}</h2><div class=row>{''.join(map(_figure, of_skill))}</div>"
        for skill, of_skill in rows.items()
    )
    return f"<!doctype html><html><meta charset=utf-8><title>Contact sheet</title><style>{_STYLE}</style>{sections}</html>\n"


def _figure(row: Mapping[str, Any]) -> str:
    format_ = row["image"]["path"].rpartition(".")[2]
    source = file_uri(row["image"]["bytes"], format_)
    score = "" if row["score"] is None else f" (score {row['score']:.2f}, {row['split']})"
    prompt = html.escape(row["prompt"])
    return f'<figure><img src="{source}" alt="{prompt}"><figcaption>{prompt}{score}</figcaption></figure>'


def _picture(rows: Mapping[str, Sequence[dict[str, Any]]]) -> bytes:
    images = [[Image.open(io.BytesIO(row["image"]["bytes"])) for row in of_skill] for of_skill in rows.values()]
    return png_bytes(picture_grid(images, _CELL_PX, titles=list(rows)))
