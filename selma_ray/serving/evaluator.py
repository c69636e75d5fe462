"""The evaluator's replica: a batched judge that scores images against their prompts."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from PIL import Image
from ray import serve

from selma_ray.errors import CaptionError
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import decode_upload
from selma_ray.serving.errors import invalid_request

__all__ = ["Evaluator", "Scorer"]

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """What the evaluator needs to know about judging."""

    def questions(self, prompt: str) -> Any:
        """Return the questions about a prompt; raises CaptionError for a prompt it has none for."""
        ...

    def score(self, images: Sequence[Image.Image], questions: Sequence[Any]) -> Sequence[Any]:
        """Judge each image by its questions; returns dataclasses with the fields of bodies.Score."""
        ...


class Evaluator:
    """Scores images, those of concurrent requests in one batch; deployed by Ray Serve."""

    def __init__(self, open_scorer: Callable[[], Scorer], config: ServingConfig) -> None:
        self._scorer = open_scorer()
        self._max_pixels = config.max_upload_pixels
        self._judge.set_max_batch_size(config.judge_batch_size)

    async def score(self, prompt: str, image: bytes) -> dict[str, Any]:
        """Score an encoded image.

        Raises RequestError: 422 for a prompt without questions, 400 or 413 for an image that cannot be used.
        """
        try:
            questions = self._scorer.questions(prompt)
        except CaptionError as error:
            raise invalid_request(str(error), "prompt", "unsupported_caption", status=422) from None
        picture = await asyncio.to_thread(decode_upload, image, self._max_pixels)
        return await self._judge((picture, questions))

    @serve.batch(batch_wait_timeout_s=0.005)
    async def _judge(self, items: list[tuple[Image.Image, Any]]) -> list[dict[str, Any]]:
        images, questions = zip(*items, strict=True)
        return [asdict(score) for score in await asyncio.to_thread(self._scorer.score, images, questions)]
