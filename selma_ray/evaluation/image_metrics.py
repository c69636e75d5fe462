"""Metrics of a finished evaluation's images, after the fact: every model's figure, and its paired difference to base.

A file of images is scored once; its scores stand beside it, under a name that depends on the images and on the metric's model. On a
cluster that is joined the files are scored by its workers, else in this process.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.placement import is_local, role_options
from selma_ray.config import StrictModel
from selma_ray.errors import JudgeError
from selma_ray.evaluation.statistics import Floats, figure, paired_difference
from selma_ray.evaluation.summary import BASE
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.metrics import MODEL_METRICS, PROMPT_METRICS, ImageMetric, open_metric
from selma_ray.models.device import see_own_gpus
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["ScoreFiles", "ScoreImagesConfig", "open_configured", "score_run"]

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
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of a worker of a cluster."""
    workers: int = Field(default=4, ge=1)
    """Most workers of a cluster that score at once."""
    cluster: ClusterConfig = ClusterConfig()
    """The cluster; without an address, here or in RAY_ADDRESS, this process scores."""
    batch_size: int = Field(default=64, ge=1)
    """Images scored at once."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples behind each confidence interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples."""


def open_configured(config: ScoreImagesConfig) -> ImageMetric:
    """Return the metric that `config` names; raises JudgeError where it cannot be opened."""
    judge = open_judge(config.judge) if config.metric in PROMPT_METRICS else None
    return open_metric(config.metric, judge, config.model, config.batch_size, config.num_gpus)


def score_run(
    folder: RunFolder, config: ScoreImagesConfig, open_metric: Callable[[], ImageMetric] | None = None
) -> dict[str, Any]:
    """Score the images of every model in a run; writes and returns `evaluation/metrics/<metric>.json`.

    `open_metric` takes the place of what `config` names. Raises JudgeError for a run without a finished evaluation, for a metric that
    needs questions, and where it cannot be opened.
    """
    if config.metric not in (*MODEL_METRICS, *PROMPT_METRICS):
        raise JudgeError(
            f"metric must be one of {', '.join((*MODEL_METRICS, *PROMPT_METRICS))} here, got {config.metric!r}; metrics of questions "
            "come from selma evaluate"
        )
    evaluated = folder.done("evaluate")
    if evaluated is None:
        raise JudgeError(f"{folder.path()} has no finished evaluation; run selma evaluate first")
    files = [
        {"model": model, "images": path}
        for model, of_model in evaluated["files"].items()
        for path in of_model["images"]
    ]
    score = _here if is_local(config.cluster) else _on_workers
    scored = score(folder, files, config, open_metric or partial(open_configured, config))
    rows = {
        model: folder.read_table([file["scores"] for file in scored if file["model"] == model]).to_pylist()
        for model in evaluated["files"]
    }
    prompts = list(dict.fromkeys(row["prompt"] for of_model in rows.values() for row in of_model))
    totals = {model: _totals(of_model, prompts) for model, of_model in rows.items()}
    result = {
        "metric": scored[0]["metric"],
        "prompts": len(prompts),
        "models": {
            model: _figures(totals[model], totals.get(BASE) if model != BASE else None, config)
            | {"images": len(of_model), "unscored": _reasons(of_model)}
            for model, of_model in rows.items()
        },
    }
    folder.write_json(result, "evaluation", "metrics", f"{config.metric}.json")
    return result


class ScoreFiles:
    """Scores files of images with one metric, each once; a stage as Ray Data calls it."""

    def __init__(self, folder: RunFolder, open_metric: Callable[[], ImageMetric], num_gpus: float = 0) -> None:
        see_own_gpus(num_gpus)
        self._folder = folder
        self._metric = open_metric()

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Take files of `images` of each `model`; adds where their `scores` stand, and the name of the `metric` with its model."""
        models, images = list(map(str, batch["model"])), list(map(str, batch["images"]))
        scores = [self._score(model, path) for model, path in zip(models, images, strict=True)]
        return {"model": models, "images": images, "scores": scores, "metric": [self._metric.name] * len(scores)}

    def _score(self, model: str, path: str) -> str:
        name = content_id(images=path, metric=self._metric.name)
        place = f"evaluation/{model}/metrics/{name}.parquet"
        if not self._folder.exists(place):
            images = self._folder.read_table([path], columns=["prompt", "seed", "image", "error"])
            self._folder.write_table(pa.Table.from_pylist(_scored(images, self._metric), _SCHEMA), place)
        return place


def _here(
    folder: RunFolder,
    files: Sequence[dict[str, str]],
    config: ScoreImagesConfig,
    open_metric: Callable[[], ImageMetric],
) -> list[dict[str, Any]]:
    columns = {name: [file[name] for file in files] for name in ("model", "images")}
    scored = ScoreFiles(folder, open_metric, config.num_gpus)(columns)
    return [dict(zip(scored, row, strict=True)) for row in zip(*scored.values(), strict=True)]


def _on_workers(
    folder: RunFolder,
    files: Sequence[dict[str, str]],
    config: ScoreImagesConfig,
    open_metric: Callable[[], ImageMetric],
) -> list[dict[str, Any]]:
    import ray.data

    connect(config.cluster)
    scored = ray.data.from_items(list(files), override_num_blocks=len(files)).map_batches(
        ScoreFiles,
        fn_constructor_args=(folder, open_metric, config.num_gpus),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(config.workers, len(files))),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus or None,
        **role_options("render", config.cluster),
    )
    try:
        by_images = {row["images"]: row for row in scored.take_all()}
    except ray.exceptions.RayError as error:
        raise JudgeError(
            f"{config.metric} could not score the images ({reason_of(error)}); fix the cause and run the same command again"
        ) from error
    return [by_images[file["images"]] for file in files]


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
