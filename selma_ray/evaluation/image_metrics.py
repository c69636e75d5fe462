"""Metrics of a finished evaluation's images, after the fact: every model's figure, and its paired difference to base.

A file of images is scored once; its scores stand beside it, under a name that depends on the images and on the metric's model.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from selma_ray.config import StrictModel
from selma_ray.errors import JudgeError
from selma_ray.evaluation.statistics import Floats, figure, paired_difference
from selma_ray.evaluation.summary import BASE
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.metrics import MODEL_METRICS, PROMPT_METRICS, ImageMetric, open_metric
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["ScoreImagesConfig", "open_configured", "score_run"]

_ROWS_AT_ONCE = 256
_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("value", pa.float64()),  # null, with a reason, where the image could not be scored
        pa.field("reason", pa.string()),
        pa.field("metric", pa.string(), nullable=False),
    ]
)


class ScoreImagesConfig(StrictModel):
    """Which metric is taken of a finished evaluation's images."""

    metric: str = "clipscore"
    """One of clipscore, pickscore, hpsv2, hpsv2.1, imagereward and vqascore."""
    model: str | None = None
    """The metric's model, a folder or a hub name; default: its public checkpoint."""
    judge: JudgeConfig = JudgeConfig()
    """The judge that vqascore asks."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a metric's own model; 0 computes on the CPU."""
    batch_size: int = Field(default=64, ge=1)
    """Images scored at once."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples behind each confidence interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples."""


def open_configured(config: ScoreImagesConfig) -> ImageMetric:
    """Return the metric that `config` names; raises JudgeError for one that needs questions, and where it cannot be opened."""
    if config.metric not in (*MODEL_METRICS, *PROMPT_METRICS):
        raise JudgeError(
            f"metric must be one of {', '.join((*MODEL_METRICS, *PROMPT_METRICS))} here, got {config.metric!r}; metrics of questions "
            "come from selma evaluate"
        )
    judge = open_judge(config.judge) if config.metric in PROMPT_METRICS else None
    return open_metric(config.metric, judge, config.model, config.batch_size, config.num_gpus)


def score_run(folder: RunFolder, metric: ImageMetric, config: ScoreImagesConfig) -> dict[str, Any]:
    """Score the images of every model in a run; writes and returns `evaluation/metrics/<metric>.json`.

    Raises JudgeError for a run without a finished evaluation.
    """
    evaluated = folder.done("evaluate")
    if evaluated is None:
        raise JudgeError(f"{folder.path()} has no finished evaluation; run selma evaluate first")
    rows = {model: _rows(folder, model, files["images"], metric) for model, files in evaluated["files"].items()}
    prompts = list(dict.fromkeys(row["prompt"] for of_model in rows.values() for row in of_model))
    totals = {model: _totals(of_model, prompts) for model, of_model in rows.items()}
    result = {
        "metric": metric.name,
        "prompts": len(prompts),
        "models": {
            model: _figures(totals[model], totals.get(BASE) if model != BASE else None, config)
            | {"images": len(of_model), "unscored": _reasons(of_model)}
            for model, of_model in rows.items()
        },
    }
    folder.write_json(result, "evaluation", "metrics", f"{config.metric}.json")
    return result


def _rows(folder: RunFolder, model: str, paths: Sequence[str], metric: ImageMetric) -> list[dict[str, Any]]:
    scored: list[dict[str, Any]] = []
    for path in paths:
        place = ("evaluation", model, "metrics", f"{content_id(images=path, metric=metric.name)}.parquet")
        if not folder.exists(*place):
            images = folder.read_table([path], columns=["prompt", "seed", "image", "error"])
            folder.write_table(pa.Table.from_pylist(_scored(images, metric), _SCHEMA), *place)
        scored += folder.read_table(["/".join(place)]).to_pylist()
    return scored


def _scored(table: pa.Table, metric: ImageMetric) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for start in range(0, len(table), _ROWS_AT_ONCE):
        part = table.slice(start, _ROWS_AT_ONCE).to_pylist()
        scores = metric.score([_opened(row["image"]) for row in part], [row["prompt"] for row in part])
        rows += [
            {"prompt": row["prompt"], "seed": row["seed"], "value": score.value, "reason": row["error"] or score.reason,
             "metric": metric.name}
            for row, score in zip(part, scores, strict=True)
        ]  # fmt: skip
    return rows


def _opened(image: Mapping[str, Any] | None) -> Image.Image | None:
    """Return an image that may yet turn out to be corrupt, None for bytes that are no image."""
    if not image or not image["bytes"]:
        return None
    try:
        return Image.open(io.BytesIO(image["bytes"]))
    except OSError:
        return None


def _totals(rows: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> tuple[Floats, Floats]:
    """Return each prompt's mean over its images, and 1 where it has any."""
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    sums_P, counts_P = np.zeros(len(prompts)), np.zeros(len(prompts))
    for row in rows:
        if row["value"] is not None:
            sums_P[row_of[row["prompt"]]] += row["value"]
            counts_P[row_of[row["prompt"]]] += 1
    return np.divide(sums_P, counts_P, out=sums_P, where=counts_P > 0), np.minimum(counts_P, 1)


def _figures(
    totals: tuple[Floats, Floats],
    base: tuple[Floats, Floats] | None,
    config: ScoreImagesConfig,
) -> dict[str, Any]:
    own = figure(*totals, config.bootstrap_resamples, config.seed)
    paired = None if base is None else paired_difference(*totals, *base, config.bootstrap_resamples, config.seed)
    return {
        "mean": own and own.mean,
        "interval": own and [own.low, own.high],
        "over_base": paired and {"mean": paired.mean, "interval": [paired.low, paired.high], "p": paired.p_bootstrap},
    }


def _reasons(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many images have no score, by reason."""
    reasons: dict[str, int] = {}
    for row in rows:
        if row["value"] is None:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return reasons
