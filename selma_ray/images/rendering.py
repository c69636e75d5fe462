"""Rendering planned images with one pipeline: row by row where a batch fails, encoding beside the denoiser."""

import io
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from PIL import Image

from selma_ray.images.config import ImagesConfig
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.records import IMAGE_SCHEMA

__all__ = ["RENDERED_SCHEMA", "RenderPrompts"]

RENDERED_SCHEMA = IMAGE_SCHEMA.append(pa.field("seconds", pa.float32()))
_LONGEST_REASON = 200

logger = logging.getLogger(__name__)


class RenderPrompts:
    """Renders batches of planned images with one pipeline held in memory.

    May be called from several threads: the denoiser runs in a thread of its own, one batch at a time, while the callers'
    threads encode what it has rendered.
    """

    def __init__(self, config: ImagesConfig, model: ModelConfig) -> None:
        # The driver ships this class to its actors without loading torch.
        import torch

        from selma_ray.models.rendering import Renderer, load_pipeline

        self._config = config
        self._denoiser = ThreadPoolExecutor(1, "denoiser", torch.set_num_threads, (max(1, int(config.num_cpus)),))
        self._renderer: Renderer = self._denoiser.submit(
            lambda: Renderer(load_pipeline(model), config.sampling)
        ).result()
        self._provenance = {
            "model": model.name,
            "revision": locate_text_to_image(model.name, model.revision).revision,
            "scheduler": type(self._renderer.pipeline.scheduler).__name__,
            "steps": config.sampling.steps,
            "guidance_scale": config.sampling.guidance_scale,
            "width": config.sampling.width_px,
            "height": config.sampling.height_px,
        }

    def __call__(self, planned: pa.Table) -> pa.Table:
        """Render rows of PLAN_SCHEMA; returns rows of RENDERED_SCHEMA, with an error for an image that failed."""
        rows = planned.to_pylist()
        if not rows:
            return RENDERED_SCHEMA.empty_table()
        images, seconds = self._denoiser.submit(self._render_timed, rows).result()
        rendered = [self._row(row, image, seconds / len(rows)) for row, image in zip(rows, images, strict=True)]
        return pa.Table.from_pylist(rendered, schema=RENDERED_SCHEMA)

    def _render_timed(self, rows: Sequence[dict[str, Any]]) -> tuple[list[Image.Image | Exception], float]:
        started_s = time.monotonic()
        return self._render(rows), time.monotonic() - started_s

    def _render(self, rows: Sequence[dict[str, Any]]) -> list[Image.Image | Exception]:
        try:
            return list(self._renderer.render([row["prompt"] for row in rows], [row["seed"] for row in rows]))
        except Exception as error:
            logger.warning("a batch of %d images failed (%s); its rows are tried one by one", len(rows), _reason(error))
            return [self._render_alone(row) for row in rows]

    def _render_alone(self, row: dict[str, Any]) -> Image.Image | Exception:
        failure: Exception = RuntimeError("not tried")
        for _ in range(self._config.max_attempts):
            try:
                return self._renderer.render([row["prompt"]], [row["seed"]])[0]
            except Exception as error:
                failure = error
        return failure

    def _row(self, planned: dict[str, Any], image: Image.Image | Exception, seconds: float) -> dict[str, Any]:
        if isinstance(image, Exception):
            outcome: dict[str, Any] = {"image": None, "error": _reason(image)}
        else:
            outcome = {"image": {"bytes": _png(image), "path": f"{planned['id']}.png"}, "error": None}
        return {**planned, **self._provenance, **outcome, "seconds": seconds}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:_LONGEST_REASON]
