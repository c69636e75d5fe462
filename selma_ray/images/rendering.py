"""Rendering planned images with one engine: row by row where a batch fails, judging and encoding beside the denoiser."""

import io
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from PIL import Image

from selma_ray.errors import named_line
from selma_ray.images.batching import SharedBatches
from selma_ray.images.config import ImagesConfig
from selma_ray.images.engines import ImageEngine, open_engine
from selma_ray.images.in_flight import begin_batch, begin_row, finish_row
from selma_ray.images.selection import OpenScorer, ScoreImages, choose
from selma_ray.models.batches import render_alone, render_each
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import see_own_gpus
from selma_ray.models.locate import locate_text_to_image
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder

__all__ = ["RENDERED_SCHEMA", "OpenEngine", "RenderPrompts", "encoded"]

OpenEngine = Callable[[ImagesConfig, ModelConfig], ImageEngine]

# `batch` is the key of the batch in flight, `again` says that an earlier process did not bring it back.
RENDERED_SCHEMA = (
    IMAGE_SCHEMA.append(pa.field("seconds", pa.float32()))
    .append(pa.field("batch", pa.string()))
    .append(pa.field("again", pa.bool_()))
)

logger = logging.getLogger(__name__)


class RenderPrompts:
    """Renders batches of planned images with one engine held in memory.

    May be called from several threads: the denoiser runs in a thread of its own, with full batches from all callers' rows,
    while the callers' threads judge and encode what it has rendered. A batch whose process died is rendered row by row; a row that ends the
    process `max_attempts` times is given up.
    """

    def __init__(
        self,
        config: ImagesConfig,
        model: ModelConfig,
        folder: RunFolder,
        open_scorer: OpenScorer | None = None,
        open_engine: OpenEngine = open_engine,
    ) -> None:
        judge = config.selection.judge if config.selection and open_scorer else None  # in this process
        see_own_gpus(max(config.num_gpus, judge.num_gpus if judge else 0))
        self._config = config
        self._folder = folder
        self._denoiser = SharedBatches(self._render, config.batch_size, kind=_size_px)
        self._engine: ImageEngine = self._denoiser.alone(open_engine, config, model)
        self._score: ScoreImages | None = open_scorer() if open_scorer else None
        self._provenance = {
            "model": model.name if config.engine == "diffusers" else config.engine,
            "revision": locate_text_to_image(model.name, model.revision).revision,
            "scheduler": self._engine.scheduler,
            "steps": config.sampling.steps,
            "guidance_scale": config.sampling.guidance_scale,
        }

    def __call__(self, planned: pa.Table) -> pa.Table:
        """Render rows of PLAN_SCHEMA; returns rows of RENDERED_SCHEMA, with an error for an image that failed."""
        rows = planned.to_pylist()
        if not rows:
            return RENDERED_SCHEMA.empty_table()
        batch, again = begin_batch(self._folder, [row["id"] for row in rows])
        outcomes = self._denoiser.alone(self._render_suspects, rows) if again else self._denoiser.render(rows)
        common = {**self._provenance, "batch": batch, "again": again}
        rendered = [
            {**row, **common, "seconds": seconds, **self._outcome(row["id"], image)}
            for row, (image, seconds) in zip(rows, outcomes, strict=True)
        ]
        if self._score is not None:
            self._select(rendered, [image for image, _ in outcomes])
        return pa.Table.from_pylist(rendered, schema=RENDERED_SCHEMA)

    def _render(self, rows: Sequence[dict[str, Any]]) -> list[Image.Image | Exception]:
        """Render rows of one size."""
        prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
        return render_each(self._at_size(rows[0]), prompts, seeds, self._config.max_attempts)

    def _render_suspects(self, rows: Sequence[dict[str, Any]]) -> list[tuple[Image.Image | Exception, float]]:
        """Render rows of which one may have ended an earlier process; it is the one that does so alone, time and again."""
        logger.warning("a batch of %d images ended its renderer's process; its rows are tried one by one", len(rows))
        outcomes = []
        for row in rows:
            started_s = time.monotonic()
            outcomes.append((self._render_suspect(row), time.monotonic() - started_s))
        return outcomes

    def _render_suspect(self, row: dict[str, Any]) -> Image.Image | Exception:
        begun = begin_row(self._folder, row["id"], self._config.max_attempts)
        if begun >= self._config.max_attempts:
            return RuntimeError(f"the renderer's process ended {begun} times while it rendered this row alone")
        image = render_alone(self._at_size(row), row["prompt"], row["seed"], self._config.max_attempts)
        finish_row(self._folder, row["id"])
        return image

    def _at_size(self, row: dict[str, Any]) -> Callable[[Sequence[str], Sequence[int]], list[Image.Image]]:
        return partial(self._engine.render, size_px=_size_px(row))

    def _outcome(self, id_: str, image: Image.Image | Exception) -> dict[str, Any]:
        if isinstance(image, Exception):
            return {"image": None, "error": named_line(image)}
        content = encoded(image, self._config.format)
        return {"image": {"bytes": content, "path": f"{id_}.{self._config.format}"}, "error": None}

    def _select(self, rendered: list[dict[str, Any]], images: Sequence[Image.Image | Exception]) -> None:
        """Score the images and reject those that are not chosen; a batch holds all images of its prompts."""
        assert self._score is not None
        assert self._config.selection is not None
        there = [image if isinstance(image, Image.Image) else None for image in images]
        choose(rendered, there, self._score, self._config.selection)


def _size_px(row: dict[str, Any]) -> tuple[int, int]:
    return row["width"], row["height"]


def encoded(image: Image.Image, format_: str) -> bytes:
    """Return the image as PNG or as lossless WebP."""
    buffer = io.BytesIO()
    image.save(buffer, format_.upper(), **({"lossless": True} if format_ == "webp" else {}))
    return buffer.getvalue()
