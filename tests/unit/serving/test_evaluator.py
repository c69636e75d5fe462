"""The evaluator's batches: images of concurrent requests together, as many as what is asked about them allows."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, encode
from selma_ray.serving.errors import RequestError
from selma_ray.serving.evaluator import Asked, Evaluator, Judged


@dataclass(frozen=True)
class Named:
    question: str


class Recorder:
    """Scores an image by the red of its first pixel and keeps the batches it was given."""

    judge = "red"
    metrics: tuple[str, ...] = ("dsg", "clipscore")
    metrics_of_questions = frozenset({"dsg"})

    def __init__(self) -> None:
        self.batches: list[list[Asked]] = []

    def questions(self, prompt: str, given: Sequence[Mapping[str, Any]] | None = None) -> Sequence[Named]:
        return [Named(str(number)) for number in range(int(prompt))]

    def score(self, asked: Sequence[Asked]) -> list[Judged]:
        self.batches.append(list(asked))
        reds = [each.image.getpixel((0, 0))[0] for each in asked]  # type: ignore[index]
        return [
            Judged(dict.fromkeys(each.metrics, red / 255), each.questions)
            for each, red in zip(asked, reds, strict=True)
        ]


@pytest.fixture(autouse=True)
def outside_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's batching asks its replica for a number that it only warns about."""
    monkeypatch.setattr(
        "ray.serve.batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda _: None
    )


def png(red: int) -> bytes:
    return encode(Image.new("RGB", (8, 8), (red, 0, 0)), PNG)


def test_batches_are_weighed_by_what_is_asked_and_a_bad_image_joins_none() -> None:
    """One test: Ray Serve keeps a method's batches for the process, in the event loop that asked first."""
    recorder = Recorder()
    requests = [("6", 1, ["dsg"]), ("40", 1, ["dsg"]), ("1", 5, ["clipscore"]), ("9", 2, ["dsg", "clipscore"])]

    async def ask() -> list[Any]:
        evaluator = Evaluator(
            lambda: recorder, ServingConfig(judge_batch_size=2, num_threads=1)
        )  # 16 questions at once
        answers = [
            evaluator.score(prompt, [png(10 * index + image) for image in range(count)], metrics)
            for index, (prompt, count, metrics) in enumerate(requests)
        ]
        return await asyncio.gather(*answers, evaluator.score("1", [b"no image"], ["dsg"]), return_exceptions=True)

    *answers, refusal = asyncio.run(ask())
    for index, answer in enumerate(answers):
        for image, found in enumerate(answer["data"]):
            assert set(found["scores"].values()) == {(10 * index + image) / 255}
    assert [len(answer["data"][0]["questions"]) for answer in answers] == [6, 40, 0, 9]
    costs = [[each.cost for each in batch] for batch in recorder.batches]
    assert sorted(cost for batch in costs for cost in batch) == [1, 1, 1, 1, 1, 6, 10, 10, 40]
    assert all(sum(batch) <= 16 or len(batch) == 1 for batch in costs)
    assert len(costs) < 9  # some shared a batch
    assert isinstance(refusal, RequestError)
    assert refusal.status == 400
