"""OpenAI's own client, unchanged, over HTTP: images, streams, models and every kind of refusal."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import queue_full, timed_out, unavailable
from selma_ray.serving.served import ModelNames
from tests.local_service import served
from tests.unit.serving.recorder import Recorder

CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64), max_body_mb=0.01
)


@pytest.fixture(scope="module")
def backend() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def url(backend: Recorder) -> Iterator[str]:
    with served(build_app(backend, CONFIG, ModelNames("merged", base=True, experts=("counting",)), ())) as url:
        yield url


@pytest.fixture
def client(url: str, backend: Recorder) -> Iterator[openai.OpenAI]:
    backend.error = None
    backend.requests.clear()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_images(client: openai.OpenAI, backend: Recorder) -> None:
    answer = client.images.generate(
        prompt="a cat", model="base", n=2, size="64x64", response_format="b64_json", output_format="webp", user="me",
        quality="auto", background="opaque", moderation="low", extra_body={"seed": 3, "num_inference_steps": 5},
    )  # fmt: skip
    assert len(answer.data or []) == 2
    assert (answer.size, answer.output_format) == ("64x64", "webp")
    assert [(request.seed, request.steps, request.mix) for request in backend.requests] == [(3, 5, ()), (4, 5, ())]


def test_a_stream(client: openai.OpenAI) -> None:
    streamed = list(client.images.generate(prompt="a cat", stream=True, partial_images=2))
    assert [type(event).__name__ for event in streamed] == ["ImageGenPartialImageEvent"] * 2 + [
        "ImageGenCompletedEvent"
    ]
    assert [getattr(event, "partial_image_index", None) for event in streamed] == [0, 1, None]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["merged", "base", "counting"]


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (queue_full(2), openai.RateLimitError),
        (unavailable("generator"), openai.InternalServerError),
        (timed_out(2), openai.InternalServerError),
        (ZeroDivisionError(), openai.InternalServerError),
    ],
)
def test_refusals_of_the_backend(client: openai.OpenAI, backend: Recorder, refusal: Any, error: Any) -> None:
    backend.error = refusal
    for stream in (False, True):
        with pytest.raises(error):
            client.images.generate(prompt="a cat", stream=stream)


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        ({"prompt": ""}, openai.BadRequestError, "invalid_value"),
        ({"prompt": "a", "model": "dall-e-3"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": "a", "extra_body": {"unknown": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"prompt": "a" * 20_000}, openai.APIStatusError, "content_too_large"),
    ],
)
def test_refusals_of_the_api(client: openai.OpenAI, body: Any, error: Any, code: str) -> None:
    with pytest.raises(error) as refusal:
        client.images.generate(**body)
    assert refusal.value.code == code
