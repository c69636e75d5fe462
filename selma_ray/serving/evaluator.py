"""The evaluator's replica: a batched judge that scores images against their prompts."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from PIL import Image
from ray import serve

from selma_ray.errors import CaptionError
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import decode_upload
from selma_ray.serving.errors import invalid_request

__all__ = ["Evaluator", "Judged", "Scorer"]

logger = logging.getLogger(__name__)

# An image is looked at once and asked all its questions: that is what it costs the judge.
_USUAL_COST = 8
_MAX_COST = 64


@dataclass(frozen=True)
class Judged:
    """What a judge found about an image."""

    scores: Mapping[str, float | None]
    """Every metric of the scorer, by name."""
    questions: Sequence[Any]
    """Dataclasses with the fields of bodies.ScoredQuestion."""


class Scorer(Protocol):
    """What the evaluator needs to know about judging."""

    judge: str
    """The judge and its revision."""
    metrics: tuple[str, ...]
    """Names of the scores that it gives."""

    def questions(self, prompt: str) -> Sequence[Any]:
        """Return the questions about a prompt; raises CaptionError for a prompt it has none for."""
        ...

    def score(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Any]]) -> Sequence[Judged]:
        """Judge each image by its questions."""
        ...


def _cost(items: Sequence[tuple[Image.Image, Sequence[Any]]]) -> int:
    return sum(min(1 + len(questions), _MAX_COST) for _, questions in items)


class Evaluator:
    """Scores images, those of concurrent requests in one batch; deployed by Ray Serve."""

    def __init__(self, open_scorer: Callable[[], Scorer], config: ServingConfig) -> None:
        self._scorer = open_scorer()
        self._max_pixels = config.max_upload_pixels
        self._judge.set_max_batch_size(max(_MAX_COST, _USUAL_COST * config.judge_batch_size))

    async def score(self, prompt: str, images: Sequence[bytes], metrics: Sequence[str]) -> dict[str, Any]:
        """Score encoded images of one prompt.

        Raises RequestError: 400 for an unknown metric, 422 for a prompt without questions, 400 or 413 for an image
        that cannot be used.
        """
        for metric in metrics:
            if metric not in self._scorer.metrics:
                raise invalid_request(
                    f"metrics must be among {', '.join(self._scorer.metrics)}, got {metric!r}", "metrics"
                )
        try:
            questions = self._scorer.questions(prompt)
        except CaptionError as error:
            raise invalid_request(str(error), "prompt", "unsupported_caption", status=422) from None
        pictures = [await asyncio.to_thread(decode_upload, image, self._max_pixels) for image in images]
        judged = await asyncio.gather(*(self._judge((picture, questions)) for picture in pictures))
        data = [
            {
                "scores": {metric: each.scores[metric] for metric in metrics},
                "questions": [asdict(question) for question in each.questions],
            }
            for each in judged
        ]
        return {"judge": self._scorer.judge, "data": data}

    @serve.batch(batch_wait_timeout_s=0.005, batch_size_fn=_cost)
    async def _judge(self, items: list[tuple[Image.Image, Sequence[Any]]]) -> list[Judged]:
        images, questions = zip(*items, strict=True)
        return list(await asyncio.to_thread(self._scorer.score, images, questions))
