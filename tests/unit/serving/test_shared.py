"""Several replicas of the API: whichever of them a client reaches, it gets the same answer."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError
from starlette.testclient import TestClient

from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.errors import RequestError
from selma_ray.serving.idempotency import Answers, Claim
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.links import StoredImage
from selma_ray.serving.metrics import Metrics
from selma_ray.serving.peers import Peers
from selma_ray.serving.remote_state import RemoteState
from selma_ray.serving.served import ModelNames
from selma_ray.serving.shared import LocalState, State
from tests.unit.serving.recorder import Recorder

KEY = "a-key-of-sufficient-length"
CONFIG = ServingConfig()
PATH = "/v1/images/generations"


def api_key(requests_per_minute: int | None = None) -> ApiKey:
    return ApiKey(hashlib.sha256(KEY.encode()).digest(), requests_per_minute)


def two_replicas(key: ApiKey, state: State | None = None) -> tuple[list[TestClient], list[Recorder]]:
    """Return clients of two replicas that share a state, and the backends before which these stand."""
    state = state or LocalState(CONFIG, [key])
    counts = [Metrics(), Metrics()]

    async def expositions() -> list[bytes]:
        return [each.exposition() for each in counts]

    backends = [Recorder(), Recorder()]
    clients = []
    for backend, metrics in zip(backends, counts, strict=True):
        peers = Peers(state, b"one secret", 1_800_000_000, metrics, expositions)
        app = build_app(backend, CONFIG, ModelNames("merged"), [key], peers=peers)
        client = TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5), raise_server_exceptions=False)
        client.headers["Authorization"] = f"Bearer {KEY}"
        clients.append(client)
    return clients, backends


def test_a_link_works_whichever_replica_answers_it() -> None:
    (one, other), _ = two_replicas(api_key())
    url = one.post(PATH, json={"prompt": "a cat", "response_format": "url"}).json()["data"][0]["url"]
    assert other.get(url).content == one.get(url).content
    assert other.get(url).headers["content-type"] == "image/png"
    assert other.get(url[:-1]).status_code == 403


def test_a_limit_counts_what_all_replicas_have_answered() -> None:
    (one, other), _ = two_replicas(api_key(requests_per_minute=3))
    answers = [client.get("/v1/models") for client in (one, other, one, other)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]


def test_a_request_that_is_sent_again_to_another_replica_is_answered_as_before() -> None:
    (one, other), backends = two_replicas(api_key())
    again = {"Idempotency-Key": "order-1"}
    first = one.post(PATH, json={"prompt": "a cat"}, headers=again)
    assert other.post(PATH, json={"prompt": "a cat"}, headers=again).content == first.content
    assert [len(backend.requests) for backend in backends] == [1, 0]
    assert other.post(PATH, json={"prompt": "a dog"}, headers=again).status_code == 409


def test_all_replicas_tell_the_same_models_and_the_counts_of_all() -> None:
    (one, other), _ = two_replicas(api_key())
    assert one.get("/v1/models").content == other.get("/v1/models").content
    one.post(PATH, json={"prompt": "a cat", "n": 2})
    other.post(PATH, json={"prompt": "a cat"})
    for client in (one, other):
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
        (images,) = (sample for sample in families["selma_images"].samples if sample.name == "selma_images_total")
        assert images.value == 3
        seconds = families["selma_http_request_seconds"]
        counted = [
            each.value for each in seconds.samples if each.name.endswith("_count") and each.labels["route"] == PATH
        ]
        assert counted == [2]
        assert seconds.type == "histogram"


def test_a_claim_of_a_replica_that_died_is_taken_over_by_who_waits() -> None:
    async def scenario() -> list[Claim]:
        answers = Answers(claims_end_after_s=0.1)
        first = await answers.claim(b"order", b"body")
        second = await answers.claim(b"order", b"body")
        answers.keep(b"order", [{"type": "http.response.start"}])
        return [first, second, await answers.claim(b"order", b"body")]

    first, second, third = asyncio.run(scenario())
    assert (first.kind, second.kind, third.kind) == ("own", "own", "repeat")


def test_who_waits_for_an_answer_gets_it_or_answers_for_itself() -> None:
    async def waited_for(end: Callable[[Answers], None]) -> Claim:
        answers = Answers()
        await answers.claim(b"order", b"body")
        waiting = asyncio.create_task(answers.claim(b"order", b"body"))
        await asyncio.sleep(0)
        assert not waiting.done()
        end(answers)
        return await waiting

    messages = [{"type": "http.response.body", "body": b"image"}]
    assert asyncio.run(waited_for(lambda answers: answers.keep(b"order", messages))) == Claim("repeat", messages)
    assert asyncio.run(waited_for(lambda answers: answers.release(b"order"))).kind == "own"


class Dead:
    """Stands for the handle of a deployment none of whose replicas live."""

    def __getattr__(self, name: str) -> "Dead":
        return self

    async def remote(self, *arguments: Any) -> Any:
        raise ActorDiedError


def test_without_the_replica_that_holds_the_state_images_are_drawn_all_the_same() -> None:
    (client, _), (backend, _) = two_replicas(api_key(requests_per_minute=1), RemoteState(Dead(), 1))
    for _ in range(2):
        answer = client.post(PATH, json={"prompt": "a cat"}, headers={"Idempotency-Key": "order-1"})
        assert answer.status_code == 200
    assert len(backend.requests) == 2
    refused = client.post(PATH, json={"prompt": "a cat", "response_format": "url"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "image_store_unavailable")


def test_the_state_s_refusal_is_passed_on() -> None:
    class Full(Dead):
        async def remote(self, *arguments: Any) -> Any:
            raise RequestError("too large", 413, "content_too_large")

    image = StoredImage("name", 0, "png", b"")
    with pytest.raises(RequestError, match="too large"):
        asyncio.run(RemoteState(Full(), 1).keep_image(image))


def test_a_client_that_leaves_gives_its_claim_back() -> None:
    class Slow(Recorder):
        begun: asyncio.Event

        async def generate(self, requests: Any, file_format: Any) -> Any:
            self.begun.set()
            return await asyncio.sleep(60)

    async def scenario() -> str:
        backend, state = Slow(), LocalState(CONFIG, [])
        backend.begun = asyncio.Event()
        app = build_app(backend, CONFIG, ModelNames("merged"), (), peers=Peers(state))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
            asked = asyncio.create_task(client.post(PATH, json={"prompt": "a"}, headers={"Idempotency-Key": "1"}))
            await backend.begun.wait()
            (name,) = state._answers._answers
            asked.cancel()
            claim = await asyncio.wait_for(state.claim(name, state._answers._answers[name].body_digest), 5)
            return claim.kind

    assert asyncio.run(scenario()) == "own"
