"""The evaluator judges concurrent requests together, and as offline evaluation does."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
from PIL import Image

from selma_ray.errors import CaptionError
from selma_ray.service import open_scorer
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import encode
from selma_ray.serving.errors import RequestError
from selma_ray.serving.evaluator import Evaluator


@dataclass(frozen=True)
class Redness:
    score: float
    prompt: str


class RednessScorer:
    """Scores an image by its red; knows prompts about balls only."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def questions(self, prompt: str) -> str:
        if "ball" not in prompt:
            raise CaptionError(f"{prompt!r} is not about a ball")
        return prompt

    def score(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Redness]:
        self.batch_sizes.append(len(images))
        return [
            Redness(image.getpixel((0, 0))[0] / 255, prompt) for image, prompt in zip(images, questions, strict=True)
        ]


def png(red: int) -> bytes:
    return encode(Image.new("RGB", (64, 64), (red, 0, 0)), "png")


def scores(open_it: Callable[[], Any], items: Sequence[tuple[str, bytes]]) -> list[Any]:
    """Score all items at once; an error stands in the place of a score."""

    async def score_all() -> list[Any]:
        evaluator = Evaluator(open_it, ServingConfig(judge_batch_size=4))
        return await asyncio.gather(*(evaluator.score(*item) for item in items), return_exceptions=True)

    return asyncio.run(score_all())


def test_concurrent_requests_share_batches_and_get_their_own_scores() -> None:
    scorer = RednessScorer()
    found = scores(lambda: scorer, [(f"ball {red}", png(red)) for red in range(10)])
    assert found == [{"score": red / 255, "prompt": f"ball {red}"} for red in range(10)]
    assert sum(scorer.batch_sizes) == 10
    assert max(scorer.batch_sizes) == 4


def test_what_cannot_be_scored_is_refused_and_spares_the_others() -> None:
    unknown, broken, good = scores(RednessScorer, [("a cube", png(1)), ("a ball", b"text"), ("a ball", png(255))])
    assert isinstance(unknown, RequestError)
    assert (unknown.status, unknown.code) == (422, "unsupported_caption")
    assert isinstance(broken, RequestError)
    assert broken.status == 400
    assert good["score"] == 1


@pytest.mark.parametrize("caption", ["a red ball", "two blue cups"])
def test_scores_online_equal_scores_offline(caption: str) -> None:
    scorer = open_scorer("miniature")
    images = [Image.new("RGB", (64, 64), (red, 80, 90)) for red in (0, 100, 200)]
    offline = scorer.score(images, [scorer.questions(caption)] * 3)
    online = scores(partial(open_scorer, "miniature"), [(caption, encode(image, "png")) for image in images])
    for got, wanted in zip(online, map(asdict, offline), strict=True):
        assert got["score"] == wanted["score"]
        for question, expected in zip(got["questions"], wanted["questions"], strict=True):
            assert question["p_yes"] == pytest.approx(expected["p_yes"], abs=1e-5)
