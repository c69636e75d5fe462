"""The service over HTTP on Ray Serve, asked by OpenAI's own client."""

import base64
import io
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from ray import cloudpickle

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import CaptionError, ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.evaluator import Asked, Judged
from selma_ray.serving.experts import open_experts
from selma_ray.serving.run import Service, start_service
from selma_ray.serving.served import ServedModels
from tests.tiny_experts import save_experts

pytestmark = pytest.mark.usefixtures("ray_cluster")
# Replicas cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

KEY = "a-key-for-the-integration-test"
SAMPLING = SamplingConfig(steps=4, guidance_scale=3.0, width_px=64, height_px=64)


class RednessScorer:
    """Scores an image by its first pixel's red; knows prompts about balls only."""

    judge = "first pixel"
    metrics: tuple[str, ...] = ("dsg", "soft_dsg")
    metrics_of_questions = frozenset(metrics)

    def questions(self, prompt: str, given: object = None) -> str:
        if "ball" not in prompt:
            raise CaptionError(f"{prompt!r} is not about a ball")
        return prompt

    def score(self, asked: Sequence[Asked]) -> list[Judged]:
        reds = [each.image.getpixel((0, 0))[0] / 255 for each in asked]  # type: ignore[index]
        return [Judged({"dsg": red, "soft_dsg": red}) for red in reds]


@pytest.fixture(scope="module")
def service(ray_cluster: None, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# keys of the test\n{KEY}\n")
    config = ServingConfig(
        port=0, api_keys_file=str(keys), sampling=SAMPLING, max_steps=500, max_batch_size=4, max_queued_requests=6,
        num_threads=1, request_timeout_s=600, num_cpus=0.25,
    )  # fmt: skip
    model = ModelConfig(name=str(tiny_pipeline_dir))
    models = ServedModels(
        "tiny", model, model, save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))
    )
    running = start_service(models, config, ClusterConfig(), RednessScorer, open_experts)
    yield running
    running.stop()


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def image_of(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


def png(colour: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_openai_client_gets_what_the_pipeline_draws(client: openai.OpenAI, tiny_pipeline_dir: Path) -> None:
    answer = client.images.generate(
        prompt="a red ball", model="tiny", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 7}
    )
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    expected = pipeline(
        prompt=["a red ball"] * 2, num_inference_steps=4, guidance_scale=3.0, width=64, height=64,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)],
    ).images  # fmt: skip
    for datum, image in zip(answer.data or [], expected, strict=True):
        difference = np.asarray(image_of(datum.b64_json), dtype=int) - np.asarray(image, dtype=int)
        assert np.abs(difference).max() <= 1


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "base", "counting", "style", "common"]


def test_the_openai_client_streams_partial_images(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="a red ball", stream=True, partial_images=2, extra_body={"seed": 7})
    streamed = list(stream)
    *partial, last = [type(event).__name__ for event in streamed]
    assert last == "ImageGenCompletedEvent"
    assert partial == ["ImageGenPartialImageEvent"] * len(partial)
    assert len(partial) <= 2
    whole = client.images.generate(prompt="a red ball", extra_body={"seed": 7})
    assert streamed[-1].b64_json == (whole.data or [])[0].b64_json
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a red ball", stream=True, partial_images=99)


def test_mixes_and_the_best_of_several(client: openai.OpenAI, http: httpx.Client) -> None:
    mix = {"counting": 0.6, "style": 0.4}
    mixed = client.images.generate(prompt="a red ball", extra_body={"model": mix, "seed": 7})
    base = client.images.generate(prompt="a red ball", model="base", extra_body={"seed": 7})
    assert (mixed.data or [])[0].b64_json != (base.data or [])[0].b64_json
    best = http.post("/v1/images/generations", json={"prompt": "a ball", "n": 1, "best_of": 4, "seed": 7}).json()
    scores = [candidate["scores"]["dsg"] for candidate in best["candidates"]]
    assert best["data"][0]["scores"]["dsg"] == max(scores)
    assert image_of(best["data"][0]["b64_json"]).getpixel((0, 0))[0] / 255 == max(scores)  # type: ignore[index]


def test_readiness_and_metrics(http: httpx.Client) -> None:
    assert http.get("/readyz").json() == {"status": "ready"}
    lines = http.get("/metrics").text
    assert "selma_engine_steps_total{replica=" in lines
    assert 'selma_http_requests_total{method="GET",route="/readyz",status="200"}' in lines


def test_own_parameters_reach_the_engine(http: httpx.Client) -> None:
    body = {"prompt": "a ball", "negative_prompt": "x", "num_inference_steps": 2, "guidance_scale": 1.5, "seed": 3}
    answers = [
        http.post("/v1/images/generations", json=body | {"size": size, "output_format": "webp"}).json()
        for size in ("96x32", "96x32", "32x96")
    ]
    assert [image_of(answer["data"][0]["b64_json"]).size for answer in answers] == [(96, 32), (96, 32), (32, 96)]
    assert answers[0]["data"] == answers[1]["data"]
    assert answers[0]["data"][0]["seed"] == 3
    assert image_of(answers[0]["data"][0]["b64_json"]).format == "WEBP"


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (openai.BadRequestError, {"prompt": ""}),
        (openai.BadRequestError, {"prompt": "a ball", "background": "transparent"}),
        (openai.BadRequestError, {"prompt": "a ball", "size": "64x63"}),
        (openai.BadRequestError, {"prompt": "a ball", "extra_body": {"unknown": 1}}),
        (openai.NotFoundError, {"prompt": "a ball", "model": "dall-e-3"}),
    ],
)
def test_the_openai_client_reads_refusals(client: openai.OpenAI, error: type[Exception], options: dict) -> None:
    with pytest.raises(error):
        client.images.generate(**options)


def test_the_openai_client_gets_links_and_warnings(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.images.generate(prompt="a red ball " * 40, response_format="url", style="vivid", quality="low")
    (datum,) = answer.data or []
    assert Image.open(io.BytesIO(httpx.get(str(datum.url), trust_env=False).content)).size == (64, 64)
    style, length = answer.warnings  # type: ignore[attr-defined]
    assert style.startswith("style is ignored")
    assert "of which the model sees the first 77" in length
    assert answer.usage.image_steps == 2  # type: ignore[attr-defined]


def test_a_wrong_key_is_refused_everywhere_but_at_healthz(service: Service, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="a-key-that-nobody-gave-out").models.list()
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}
    assert httpx.post(f"{service.url}/v1/scores", json={}).status_code == 401


def test_scores(http: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(
            lambda red: http.post("/v1/scores", json={"prompt": "a ball", "image": png((red, 0, 0))}).json(),
            (0, 51, 255),
        )
    assert [answer["data"][0]["scores"]["dsg"] for answer in answers] == [0, 0.2, 1]


def test_a_caption_without_questions_is_answered_422_with_the_reason(http: httpx.Client) -> None:
    answer = http.post("/v1/scores", json={"prompt": "a cube", "image": png((0, 0, 0))})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unsupported_caption")
    assert "not about a ball" in answer.json()["error"]["message"]


def test_more_than_the_queue_holds_is_answered_429_and_the_rest_is_drawn(http: httpx.Client) -> None:
    body = {"prompt": "a ball", "n": 5, "num_inference_steps": 30, "seed": 1}  # room for 10: two requests
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/images/generations", json=body), range(6)))
    refused = [answer for answer in answers if answer.status_code == 429]
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(refused) + len(served) == 6
    assert len(served) >= 2
    assert refused
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert len({answer.json()["data"][0]["b64_json"] for answer in served}) == 1


def test_a_client_that_goes_away_frees_its_slots(http: httpx.Client) -> None:
    body = {"prompt": "a ball", "n": 10, "num_inference_steps": 500}  # the whole room, for long

    def abandon() -> None:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/images/generations", json=body, timeout=1)

    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join()
    answer = None
    for _ in range(50):
        answer = http.post("/v1/images/generations", json={"prompt": "a ball", "num_inference_steps": 1})
        if answer.status_code == 200:
            break
        assert answer.status_code == 429
        threading.Event().wait(0.2)
    assert answer is not None
    assert answer.status_code == 200


def test_the_handle_fetches_an_image(service: Service) -> None:
    image = Image.open(io.BytesIO(service.generate("a ball", seed=0)))
    assert (image.format, image.size) == ("PNG", (64, 64))


def test_another_service_stands_beside_the_first_and_leaves_it_alone(service: Service, tiny_pipeline_dir: Path) -> None:
    models = ServedModels("tiny", ModelConfig(name=str(tiny_pipeline_dir)))

    def start(**changes: Any) -> Service:
        config = ServingConfig(sampling=SAMPLING, evaluator_replicas=0, port=0).model_copy(update=changes)
        return start_service(models, config, ClusterConfig(), RednessScorer, name="second")

    with pytest.raises(
        ConfigError, match=r"a service named selma runs on this cluster already, at http://127.0.0.1:\d+/; stop it"
    ):
        start(application="selma", route_prefix="/other")
    with pytest.raises(
        ConfigError, match=r"the service selma has the paths from / on .*; set serving.route_prefix .* /second"
    ):
        start()
    with pytest.raises(ConfigError, match=r"the services of this cluster listen on port \d+, serving.port is 1"):
        start(route_prefix="/second", port=1)
    second = start(route_prefix="/second")
    try:
        assert second.url == f"{service.url}/second"
        assert Image.open(io.BytesIO(second.generate("a ball", seed=0))).size == (64, 64)
        with httpx.Client(trust_env=False) as client:
            assert (
                "/second/"
                not in client.get(f"{service.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).text
            )
            assert client.get(f"{second.url}/v1/models").json()["data"][0]["id"] == "tiny"
            assert client.get(second.url + "/").status_code == 200  # the page
    finally:
        second.stop()
    assert Image.open(io.BytesIO(service.generate("a ball", seed=0))).size == (64, 64)
