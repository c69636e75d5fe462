"""The generator's replica: one pipeline, one engine, images as encoded bytes."""

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

from selma_ray.models.config import ModelConfig
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat, encode
from selma_ray.serving.engine import Engine
from selma_ray.serving.requests import ImageRequest

__all__ = ["Generator", "engine_for", "use_threads"]

logger = logging.getLogger(__name__)


class Generator:
    """Draws images for any number of callers at once on one step-batching engine; deployed by Ray Serve."""

    def __init__(self, model: ModelConfig, config: ServingConfig) -> None:
        from selma_ray.models.rendering import load_pipeline, use_scheduler

        use_threads(config.num_threads)
        pipeline = load_pipeline(model)
        use_scheduler(pipeline, config.sampling.scheduler)
        self._stall_s = config.request_timeout_s
        self._engine = engine_for(pipeline, config)
        logger.info("%s is loaded", model.name)

    async def generate(self, requests: Sequence[ImageRequest], output_format: OutputFormat) -> list[bytes]:
        """Return one encoded image a request; raises RequestError (429) where the queue is full."""
        futures = [asyncio.wrap_future(future) for future in self._engine.submit(requests)]
        try:
            images = await asyncio.gather(*futures)
        finally:
            # When the caller goes away, or one image fails, the slots of the others are freed.
            for future in futures:
                future.cancel()
        return await asyncio.to_thread(lambda: [encode(image, output_format) for image in images])

    def check_health(self) -> None:
        """Raise where the engine is dead or stuck, so that Ray Serve replaces the replica."""
        self._engine.check_health(self._stall_s)


def engine_for(pipeline: Any, config: ServingConfig) -> Engine:
    """Return a running engine around a loaded pipeline; raises ConfigError for a family that cannot be served."""
    from selma_ray.serving.batch import StepBatch
    from selma_ray.serving.denoisers import denoiser_for

    full_size_px = (config.sampling.height_px, config.sampling.width_px)
    batch = StepBatch(denoiser_for(pipeline), config.max_batch_size, full_size_px)
    return Engine(batch, config.max_batch_size + config.max_queued_requests)


def use_threads(num_threads: int | None) -> None:
    """Let torch use `num_threads`, or every core of the node: Ray gives a replica with less than a CPU one thread."""
    import torch

    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
