"""Choosing among images that are rendered already: judges in actors of their own, once the questions about all prompts are there."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.placement import role_options
from selma_ray.errors import RenderError
from selma_ray.images.config import ImageChoiceConfig
from selma_ray.images.selection import OpenScorer, choose
from selma_ray.images.shards import candidate_shards, write_shards
from selma_ray.models.device import see_own_gpus
from selma_ray.progress import Progress, Report
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder

__all__ = ["ChooseImages", "choose_images"]

_MAX_RESTARTS = 3  # of a judge that dies; a file that kills it every time ends the stage


def choose_images(
    folder: RunFolder,
    config: ImageChoiceConfig,
    open_scorer: OpenScorer,
    cluster: ClusterConfig,
    report: Report | None = None,
) -> None:
    """Judge every candidate of a run and write the images with their scores; a stage that was stopped goes on.

    Raises RenderError where the judges cannot start or keep dying.
    """
    import ray.data

    paths = candidate_shards(folder)
    if not paths:
        return
    judge = config.judge
    stream = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths)).map_batches(
        ChooseImages,
        fn_constructor_args=(folder, config, open_scorer),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(max(1, config.judges), len(paths))),
        num_cpus=judge.num_cpus,
        num_gpus=judge.num_gpus or None,
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_RESTARTS,
        **role_options("render", cluster),
    )
    try:
        for done, _ in enumerate(stream.iter_rows(), start=1):
            if report:
                report(Progress("generate", done, len(paths), f"files of images judged by {judge.name}"))
    except Exception as error:
        raise RenderError(
            f"the judge {judge.name} of images.selection failed ({reason_of(error)}); fix the cause and run the same command again"
        ) from error


class ChooseImages:
    """A stage as Ray Data calls it: paths of candidates in, the same paths out once their images are judged and written."""

    def __init__(self, folder: RunFolder, config: ImageChoiceConfig, open_scorer: OpenScorer) -> None:
        see_own_gpus(config.judge.num_gpus)
        self._folder = folder
        self._config = config
        self._score = open_scorer()

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Judge the candidates of each file and write them as images; the file goes when they are written."""
        for path in batch["path"]:
            # Files of several batches may have been put together, and a prompt's images must stand side by side.
            rows = self._folder.read_table([str(path)]).sort_by([("prompt", "ascending"), ("image_index", "ascending")])
            judged = rows.to_pylist()
            choose(judged, [_opened(row) for row in judged], self._score, self._config)
            write_shards(self._folder, pa.Table.from_pylist(judged, schema=IMAGE_SCHEMA))
            self._folder.delete(str(path))
        return {"path": list(batch["path"])}


def _opened(row: Mapping[str, Any]) -> Image.Image | None:
    return None if row["error"] else Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
