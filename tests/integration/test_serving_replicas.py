"""Two replicas of the API before two runs, on Ray Serve: whichever answers, a client finds the same."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from selma_ray.cluster.config import ClusterConfig
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.experts import open_experts
from selma_ray.serving.run import Service, start_service
from selma_ray.serving.served import Hosted, ServedModels
from tests.tiny_experts import save_experts

pytestmark = pytest.mark.usefixtures("ray_cluster")

KEY = "a-key-for-the-integration-test"
LIMITED_KEY = "a-key-with-a-limit-of-its-own"
LIMIT = 12  # requests a minute
PATH = "/v1/images/generations"
REQUESTS = 12  # of one kind: that all of them reach one replica of two is as likely as 12 equal tosses of a coin


@pytest.fixture(scope="module")
def service(ray_cluster: None, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n{LIMITED_KEY} {LIMIT}\n")
    config = ServingConfig(
        port=0, api_keys_file=str(keys), sampling=SamplingConfig(steps=2, guidance_scale=1.0, width_px=64, height_px=64),
        num_threads=1, request_timeout_s=300, num_cpus=0.25, evaluator_replicas=0, api_replicas=2,
    )  # fmt: skip
    wide = config.model_copy(
        update={"sampling": SamplingConfig(steps=1, guidance_scale=1.0, width_px=96, height_px=64)}
    )
    model = ModelConfig(name=str(tiny_pipeline_dir))
    experts = save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))
    others = {"wide": Hosted(ServedModels("wide", model, model, {"style": experts["style"]}, "wide/"), wide)}
    running = start_service(
        ServedModels("tiny", model),
        config,
        ClusterConfig(),
        lambda: None,
        open_experts,
        others=others,
    )
    yield running
    running.stop()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
        yield client


def image_of(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_models_of_both_runs_are_listed_and_drawn(http: httpx.Client) -> None:
    names = ["tiny", "wide", "wide/base", "wide/style"]
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == names
    sizes = {}
    for name in names:
        answer = http.post(PATH, json={"prompt": "a red ball", "model": name, "seed": 1})
        assert answer.status_code == 200, answer.text
        sizes[name] = image_of(base64.b64decode(answer.json()["data"][0]["b64_json"])).size
    assert sizes == {"tiny": (64, 64), "wide": (96, 64), "wide/base": (96, 64), "wide/style": (96, 64)}
    assert http.post(PATH, json={"prompt": "a red ball", "model": "style"}).status_code == 404


def test_links_work_whichever_replica_answers(http: httpx.Client) -> None:
    answer = http.post(PATH, json={"prompt": "a red ball", "response_format": "url", "seed": 1}).json()
    contents = {httpx.get(answer["data"][0]["url"], trust_env=False).content for _ in range(REQUESTS)}
    assert len(contents) == 1
    assert image_of(contents.pop()).size == (64, 64)


def test_a_request_that_is_sent_again_is_answered_as_before(http: httpx.Client) -> None:
    again = {"Idempotency-Key": "order-1"}
    answers = [http.post(PATH, json={"prompt": "a red ball"}, headers=again) for _ in range(REQUESTS)]
    assert len({answer.content for answer in answers}) == 1, "else each would have a seed of its own"


def test_the_counts_are_of_both_replicas_together(http: httpx.Client) -> None:
    def count() -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        (requests,) = (family for family in families if family.name == "selma_http_requests")
        return sum(
            each.value
            for each in requests.samples
            if each.name.endswith("_total") and each.labels["route"] == "/v1/models"
        )

    before = count()
    for _ in range(REQUESTS):
        http.get("/v1/models")
    assert count() == before + REQUESTS


def test_a_limit_is_of_both_replicas_together(service: Service) -> None:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {LIMITED_KEY}"}, timeout=60) as http:
        statuses = [http.get("/v1/models").status_code for _ in range(3 * LIMIT // 2)]
    assert statuses[:2] == [200, 200]
    assert 429 in statuses, "two limits, one of each replica, would let all of them pass"


def test_all_replicas_drain(service: Service, http: httpx.Client) -> None:
    service.drain()
    answers = [http.post(PATH, json={"prompt": "a red ball"}) for _ in range(REQUESTS)]
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"shutting_down"}
