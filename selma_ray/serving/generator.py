"""The generator's replica: one engine over the merged model and the base with its experts, images as encoded bytes."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from PIL import Image
from pydantic import Field

from selma_ray.adapters.mixes import Mix
from selma_ray.adapters.mixing import Expert
from selma_ray.config import StrictModel, validate
from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of, see_own_gpus
from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, FileFormat, encode
from selma_ray.serving.engine import Engine
from selma_ray.serving.errors import RequestError
from selma_ray.serving.experts import OpenExperts
from selma_ray.serving.filters import Filters, open_filters
from selma_ray.serving.metadata import metadata_of
from selma_ray.serving.requests import MERGED, ImageRequest
from selma_ray.serving.served import BASE, ServedModels
from selma_ray.serving.threads import use_threads

__all__ = ["Generator", "MergedWeights", "engine_for"]

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 4


class MergedWeights(StrictModel):
    """The generator's user_config in Ray Serve: which merged weights to draw with, and more adapters, changed without a restart."""

    pipeline: str | None = None
    """A baked pipeline, whose denoiser is taken; default: the one that the service was started with."""
    adapter: str | None = None
    """A PEFT adapter folder to fold into the base model instead."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRAs beside those of serving.adapters, by name; one that is no longer named is offered no longer."""


class Generator:
    """Draws images for any number of callers at once on one step-batching engine; deployed by Ray Serve."""

    def __init__(self, models: ServedModels, config: ServingConfig, open_experts: OpenExperts | None = None) -> None:
        see_own_gpus(config.num_gpus)
        from selma_ray.models.family import open_predictor
        from selma_ray.models.rendering import load_pipeline
        from selma_ray.models.schedulers import use_scheduler

        started_s = time.monotonic()
        use_threads(config.num_threads)
        self._models, self._config = models, config
        self._name = secrets.token_hex(4)
        self._weights = MergedWeights()
        device = device_of(config.num_gpus, "serving.num_gpus")
        # One after the other: transformers loads through a switch to the meta device that all threads share.
        self._pipeline = load_pipeline(models.merged, device)
        self._mixing = _base_denoiser(models.base, device)
        use_scheduler(self._pipeline, config.sampling.scheduler, config.sampling.scheduler_config)
        self._count_tokens = open_predictor(self._pipeline).tokens
        self._filters = open_filters(config, self._pipeline)
        if not config.safety_checker and getattr(self._pipeline, "safety_checker", None) is not None:
            self._pipeline.safety_checker = None  # 1.2 GB that nobody asks
        self._open_experts = open_experts
        base = None if self._mixing is None else _with_denoiser(self._pipeline, self._mixing)
        experts = self._read(models.experts)
        self._loaded = set(models.experts)
        self._paths = dict(models.experts)
        self._engine = engine_for(self._pipeline, config, base, experts, self._filters)
        self._warm_up(mixes=[MERGED] if base is None else [MERGED, ()])
        self.start_s = time.monotonic() - started_s
        self.swap_s = 0.0
        logger.info("%s is loaded in %.1f s", models.merged.name, self.start_s)

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        """Return one encoded image a request; raises RequestError: 429 where the queue is full, 400 for what a filter refuses."""
        await self._check_prompts(requests)
        self._refuse_what_left(requests)
        futures = [asyncio.wrap_future(future) for future in self._engine.submit(requests)]
        try:
            images = await asyncio.gather(*futures)
        finally:
            # When the caller goes away, or one image fails, the slots of the others are freed.
            for future in futures:
                future.cancel()
        files = await asyncio.to_thread(lambda: list(map(partial(self._encoded, file_format), images, requests)))
        return Images(files, *self._tokens(requests))

    async def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        """Yield previews and finished images as they come; raises RequestError as `generate` does."""
        await self._check_prompts(requests)
        self._refuse_what_left(requests)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, int | None, Any]] = asyncio.Queue()

        def arrive(index: int, preview: int | None, image: Any) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (index, preview, image))

        futures = self._engine.submit(requests, on_preview=arrive)
        for index, future in enumerate(futures):
            future.add_done_callback(partial(arrive, index, None))
        unfinished, tokens = len(futures), self._tokens(requests)
        try:
            while unfinished:
                index, preview, image = await arrived.get()
                if preview is None:
                    unfinished -= 1
                    image = image.result()
                file = await asyncio.to_thread(self._encoded, file_format, image, requests[index])
                yield Drawn(index, file, preview, *tokens)
        finally:
            for future in futures:
                future.cancel()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load other merged weights beside the ones in use and change over; called by Ray Serve with MergedWeights.

        Raises ConfigError or AdapterError, and goes on with the old weights, where the new ones cannot be used.
        """
        weights = validate(MergedWeights, user_config, source="user_config of the generator")
        if weights == self._weights:
            return
        started_s = time.monotonic()
        added = await asyncio.to_thread(self._read, self._new_adapters(weights.adapters))
        if weights.model_copy(update={"adapters": self._weights.adapters}) != self._weights:
            self._engine.replace_merged(await asyncio.to_thread(self._merged_denoiser, weights))
        self._engine.add_experts(added)
        loaded = {*self._models.experts, *weights.adapters}
        self._engine.remove_experts(self._loaded - loaded)
        self._loaded = loaded
        self._paths |= weights.adapters
        self._weights = weights
        self.swap_s = time.monotonic() - started_s
        logger.info("weights were changed in %.1f s", self.swap_s)

    def stats(self) -> dict[str, Any]:
        """Return the engine's counts, and how long loading and the last change of weights took."""
        return {
            **asdict(self._engine.stats()),
            "replica": self._name,
            "experts": list({**self._models.experts, **self._weights.adapters}),
            "start_s": self.start_s,
            "swap_s": self.swap_s,
        }

    def check_health(self) -> None:
        """Raise where the engine is dead or stuck, so that Ray Serve replaces the replica."""
        self._engine.check_health(self._config.stall_timeout_s)

    def close(self) -> None:
        """Stop the engine after the step in progress."""
        self._engine.close()

    def _read(self, paths: Mapping[str, str]) -> Mapping[str, Expert]:
        if not paths or self._open_experts is None:
            return {}
        return self._open_experts(paths, self._mixing, type(self._pipeline))

    def _new_adapters(self, adapters: Mapping[str, str]) -> dict[str, str]:
        """Return those that are not loaded; raises ConfigError for names that are taken, and without a base to add them to."""
        if adapters and self._mixing is None:
            raise ConfigError(
                "user_config.adapters must be empty where no base model is served; set serving.experts or serving.adapters"
            )
        for name, path in adapters.items():
            if name in (BASE, self._models.name) or self._paths.get(name, path) != path:
                raise ConfigError(
                    f"user_config.adapters.{name} must have a name that no other model has had here; choose another one"
                )
        return {name: path for name, path in adapters.items() if name not in self._loaded}

    def _encoded(self, file_format: FileFormat, image: Image.Image, request: ImageRequest) -> bytes:
        metadata = None
        if self._config.image_metadata:
            metadata = metadata_of(request, self._models.names, type(self._pipeline.scheduler).__name__)
        return encode(image, file_format, metadata)

    def _tokens(self, requests: Sequence[ImageRequest]) -> tuple[int, int]:
        """Return how many tokens the prompt of some requests has, and how many the model sees."""
        return self._count_tokens(requests[0].prompt) if requests else (0, 0)

    def _warm_up(self, mixes: Sequence[Mix | None]) -> None:
        """Draw an image of the default size with each denoiser, so that the first request finds kernels prepared and steps measured."""
        sampling = self._config.sampling
        for steps in dict.fromkeys((min(_WARM_UP_STEPS, sampling.steps), sampling.steps)):
            drawings = [
                ImageRequest("", 0, steps, sampling.guidance_scale, sampling.width_px, sampling.height_px, mix=mix)
                for mix in mixes
            ]
            try:
                for drawing, drawn in zip(drawings, self._engine.submit(drawings), strict=True):
                    self._encoded(PNG, drawn.result(), drawing)
                self._tokens(drawings)
                return
            except RequestError as error:  # some schedulers take no few steps; a filter may refuse anything
                logger.info("warming up with %d steps failed: %s", steps, error)

    async def _check_prompts(self, requests: Sequence[ImageRequest]) -> None:
        if self._filters:
            await asyncio.to_thread(self._filters.check_prompts, [request.prompt for request in requests])

    def _refuse_what_left(self, requests: Sequence[ImageRequest]) -> None:
        """Raise RequestError (404) for a mix of what is loaded no longer: whoever asks may not know yet."""
        for name in {name for request in requests for name, _ in request.mix or ()} - self._loaded:
            loaded = tuple(each for each in self._paths if each in self._loaded)
            raise replace(self._models.names, experts=loaded).unknown(self._models.prefix + name)

    def _merged_denoiser(self, weights: MergedWeights) -> Any:
        from selma_ray.serving.denoiser import denoiser_for

        model = self._models.merged
        if weights.adapter is not None:
            model = self._models.base or model
        elif weights.pipeline is not None:
            model = model.model_copy(update={"name": weights.pipeline, "revision": None, "variant": None})
        pipeline = _with_denoiser(
            self._pipeline, _adapted_denoiser(model, weights.adapter, self._pipeline._execution_device)
        )
        config = self._config
        return denoiser_for(pipeline, cache_interval=config.cache_interval, fixed_rows=config.fixed_rows)


def engine_for(
    pipeline: Any,
    config: ServingConfig,
    base: Any = None,
    experts: Mapping[str, Expert] | None = None,
    filters: Filters | None = None,
) -> Engine:
    """Return a running engine around a loaded pipeline and, where there is one, the base with its experts.

    Raises ConfigError for a family that cannot be served, AdapterError for an expert that does not fit.
    """
    from selma_ray.serving.batch import StepBatch
    from selma_ray.serving.denoiser import denoiser_for

    full_size_px = (config.sampling.height_px, config.sampling.width_px)
    mixing = None if base is None else denoiser_for(base, experts, config.cache_interval, config.fixed_rows)
    merged = denoiser_for(pipeline, cache_interval=config.cache_interval, fixed_rows=config.fixed_rows)
    batch = StepBatch(merged, config.max_batch_size, full_size_px, mixing, config.weights_by_size_px)
    room = config.max_batch_size + config.max_queued_requests
    return Engine(batch, room, config.request_timeout_s, filters.check_images if filters else None)


def _with_denoiser(pipeline: Any, denoiser: Any) -> Any:
    """Return a pipeline with another denoiser that shares everything else with `pipeline`."""
    from selma_ray.models.parts import denoiser_name

    other = copy(pipeline)
    setattr(other, denoiser_name(pipeline), denoiser)
    return other


def _base_denoiser(model: ModelConfig | None, device: Any) -> Any:
    """Return the denoiser of the base model; None where there is none.

    On the CPU it is loaded alone. On a card it is placed as `model.card` says, which is about whole pipelines.
    """
    if model is None:
        return None
    if device.type != "cpu":
        return _adapted_denoiser(model, None, device)
    from selma_ray.models.family import open_family
    from selma_ray.models.parts import DTYPES

    return open_family(model).load_denoiser(DTYPES[model.dtype]).eval()


def _adapted_denoiser(model: ModelConfig, adapter_dir: str | None, device: Any) -> Any:
    """Return the denoiser of a model, with an adapter folded in where there is one."""
    from selma_ray.adapters.applying import load_adapted_pipeline
    from selma_ray.models.parts import denoiser_of

    return denoiser_of(load_adapted_pipeline(model, adapter_dir, device))
