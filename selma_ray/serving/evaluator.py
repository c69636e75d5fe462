"""The evaluator's replica: a judge, and models of other scores, that score images against their prompts in batches."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image
from ray import serve

from selma_ray.errors import JudgeError, NoQuestionsError
from selma_ray.models.device import see_own_gpus
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import count_pixels, decode_upload
from selma_ray.serving.errors import invalid_request, metric_not_served, too_large
from selma_ray.serving.threads import use_threads

__all__ = ["Asked", "Evaluator", "Judged", "PixelBudget", "Scorer", "answer_of", "count_uploads", "prepare"]

_USUAL_QUESTIONS = 8
_REQUESTS_IN_MEMORY = 2  # requests of the largest size whose images are decoded at a time, or many small ones
_DECODING = threading.Lock()


@dataclass(frozen=True)
class Asked:
    """An image and what is to be found out about it."""

    image: Image.Image
    prompt: str
    metrics: tuple[str, ...]
    """The scores that are wanted, by name."""
    questions: Sequence[Any] = ()
    """The prompt's questions, where one of the scores is computed from their answers."""
    cost: int = 1
    """How often a model is asked about the image: once a question, and once for every score without questions."""


@dataclass(frozen=True)
class Judged:
    """What was found about an image."""

    scores: dict[str, float | None]
    """At least the scores that were asked for."""
    questions: Sequence[Any] = ()
    """Dataclasses with the fields of bodies.ScoredQuestion."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a score is None, by its name."""


class Scorer(Protocol):
    """What the evaluator needs to know about scoring."""

    judge: str | None
    """The judge and its revision; none where there is none."""
    metrics: tuple[str, ...]
    """Names of the scores that it gives."""
    metrics_of_questions: frozenset[str]
    """Those of them that are computed from the answers to a prompt's questions, all from one pass."""

    def questions(self, prompt: str, given: Sequence[Mapping[str, Any]] | None = None) -> Sequence[Any]:
        """Return the questions about a prompt, those that are given where there are any.

        Raises NoQuestionsError for a prompt it has none for, JudgeError for given ones that cannot be asked.
        """
        ...

    def score(self, asked: Sequence[Asked]) -> Sequence[Judged]:
        """Score each image; the scores of one do not depend on the others."""
        ...


class Evaluator:
    """Scores images, those of concurrent requests in one batch; deployed by Ray Serve."""

    def __init__(self, open_scorer: Callable[[], Scorer], config: ServingConfig) -> None:
        see_own_gpus(config.evaluator_num_gpus)
        use_threads(config.num_threads)
        self._scorer = open_scorer()
        self._max_pixels = config.max_upload_pixels
        self._background = config.upload_background
        self._room = PixelBudget(_REQUESTS_IN_MEMORY * config.max_upload_pixels)
        self._max_cost = _USUAL_QUESTIONS * config.judge_batch_size
        self._judge.set_max_batch_size(self._max_cost)

    async def score(
        self,
        prompt: str,
        images: Sequence[bytes],
        metrics: Sequence[str],
        questions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Score encoded images of one prompt, by questions with the fields of bodies.AskedQuestion where they are given.

        Raises RequestError: 400 for an unknown metric and for questions that cannot be asked, 422 for a prompt without
        questions, 400 or 413 for an image that cannot be used.
        """
        contents = await asyncio.to_thread(count_uploads, images, self._max_pixels)
        async with self._room.taken(contents):
            asked = await asyncio.to_thread(
                prepare, self._scorer, prompt, images, metrics, self._max_pixels, questions, self._background
            )
            # An image may have more questions than a whole batch usually holds: it is then a batch of its own.
            judged = await asyncio.gather(*(self._judge((min(each.cost, self._max_cost), each)) for each in asked))
            return answer_of(self._scorer, asked, judged)

    @serve.batch(batch_wait_timeout_s=0.005, batch_size_fn=lambda items: sum(cost for cost, _ in items))
    async def _judge(self, items: list[tuple[int, Asked]]) -> list[Judged]:
        return list(await asyncio.to_thread(self._scorer.score, [asked for _, asked in items]))


def prepare(
    scorer: Scorer,
    prompt: str,
    images: Sequence[bytes],
    metrics: Sequence[str],
    max_pixels: int,
    given_questions: Sequence[Mapping[str, Any]] | None = None,
    background: str = "white",
) -> list[Asked]:
    """Return what `scorer` is to be asked about encoded images of one prompt; raises RequestError as Evaluator.score does."""
    for metric in metrics:
        if metric not in scorer.metrics:
            raise metric_not_served("metrics", metric, scorer.metrics)
    without_questions = [metric for metric in metrics if metric not in scorer.metrics_of_questions]
    questions: Sequence[Any] = ()
    if len(without_questions) < len(metrics):
        try:
            questions = scorer.questions(prompt, given_questions)
        except NoQuestionsError as error:
            raise invalid_request(
                f"{error}; send questions, or ask for a score that needs none",
                "prompt",
                "unsupported_caption",
                status=422,
            ) from None
        except JudgeError as error:
            raise invalid_request(str(error), "questions") from None
    cost = max(1, len(questions) + len(without_questions))
    return [Asked(_decoded(image, max_pixels, background), prompt, tuple(metrics), questions, cost) for image in images]


def _decoded(image: bytes, max_pixels: int, background: str) -> Image.Image:
    # Decoders hold a few times what an image takes: one at a time, whoever sent it.
    with _DECODING:
        return decode_upload(image, max_pixels, background)


def count_uploads(images: Sequence[bytes], max_pixels: int) -> int:
    """Return the pixels of a request's images together, by their headers; raises RequestError: 413 for more than `max_pixels`."""
    pixels = sum(count_pixels(image, max_pixels) for image in images)
    if pixels > max_pixels:
        raise too_large(
            f"the images must have at most {max_pixels} pixels together, got {pixels}; send fewer or smaller ones",
            "images",
        )
    return pixels


class PixelBudget:
    """Room for decoded images of several requests: whoever finds it taken waits."""

    def __init__(self, pixels: int) -> None:
        self._left = pixels
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, pixels: int) -> AsyncIterator[None]:
        """Hold room for so many pixels, at most all there is."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            async with self._changed:
                self._left += pixels
                self._changed.notify_all()


def answer_of(scorer: Scorer, asked: Sequence[Asked], judged: Sequence[Judged]) -> dict[str, Any]:
    """Return what bodies.Scores holds about images, without the prompt."""
    data = [
        {
            "scores": {metric: found.scores[metric] for metric in each.metrics},
            "reasons": dict(found.reasons),
            "questions": [asdict(question) for question in found.questions],
        }
        for each, found in zip(asked, judged, strict=True)
    ]
    return {"judge": scorer.judge, "data": data}
