"""What clients of OpenAI's API really send and rely on: their bodies, links, headers, repeats, and messages a person can use."""

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, encode
from selma_ray.serving.errors import RequestError, invalid_request, queue_full
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.links import ImageLinks, ImageStore, StoredImage
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import TOKEN_LIMIT, Recorder, picture

NAMES = ModelNames("merged", base=True, experts=("counting", "style"))
KEY = "a-key-of-sufficient-length"
SAMPLING = SamplingConfig(steps=20, guidance_scale=2.0, width_px=1024, height_px=1024)
ORIGIN = "https://app.example.com"
PATH = "/v1/images/generations"

# As the clients' current releases build them; the model's name is what their users type in.
BODIES: dict[str, dict[str, Any]] = {
    "LibreChat, DALL-E 3 tool": {
        "model": "merged", "quality": "standard", "style": "vivid", "size": "1024x1024", "prompt": "a cat", "n": 1,
    },
    "LibreChat, OpenAI image tool": {
        "model": "merged", "prompt": "a cat", "background": "auto", "n": 1, "output_compression": 100,
        "output_format": "png", "quality": "auto", "size": "auto",
    },
    "Dify, DALL-E tool": {
        "prompt": "a cat", "model": "merged", "size": "1024x1024", "n": 1, "quality": "hd", "style": "natural",
        "response_format": "b64_json",
    },
    "Dify, GPT image tool": {
        "prompt": "a cat", "model": "merged", "size": "auto", "n": 1, "quality": "high", "background": "opaque",
        "output_format": "jpeg", "output_compression": 80, "moderation": "low",
    },
    "Vercel AI SDK": {
        "model": "merged", "prompt": "a cat", "n": 1, "size": "1024x1024", "response_format": "b64_json", "style": None,
    },
    "Open WebUI": {"model": "merged", "prompt": "a cat", "n": 1, "size": "1024x1024", "response_format": "b64_json"},
    "LangChain, DallEAPIWrapper": {"prompt": "a cat", "n": 1, "size": "1024x1024", "model": "merged", "quality": "standard"},
    "LiteLLM, all parameters": {
        "model": "merged", "prompt": "a cat", "n": 1, "quality": "medium", "response_format": "b64_json",
        "size": "1024x1024", "style": "vivid", "user": "u-1", "safety_identifier": "s-1", "input_fidelity": "high",
    },
    "everything null": dict.fromkeys(
        ["model", "n", "size", "response_format", "output_format", "output_compression", "quality", "background", "style",
         "moderation", "user", "safety_identifier", "stream", "partial_images", "seed", "complexity", "frame_count",
         "frame_duration_ms", "svg", "input_fidelity"]
    ) | {"prompt": "a cat"},
}  # fmt: skip


@pytest.fixture
def client(backend: Recorder) -> TestClient:
    return client_for(backend)


def client_for(backend: Recorder, keys: Mapping[str, int | None] | None = None, **config: Any) -> TestClient:
    known = [ApiKey(hashlib.sha256(key.encode()).digest(), limit) for key, limit in (keys or {}).items()]
    app = build_app(backend, ServingConfig(sampling=SAMPLING, max_steps=50, **config), NAMES, known)
    headers = {"Authorization": f"Bearer {next(iter(keys))}"} if keys else {}
    return TestClient(
        app, "http://127.0.0.1:8000", client=("127.0.0.1", 5), raise_server_exceptions=False, headers=headers
    )


def generate(client: TestClient, **body: Any) -> Any:
    return client.post(PATH, json={"prompt": "a cat"} | body)


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_clients_are_answered(client: TestClient, name: str) -> None:
    answer = client.post(PATH, json=BODIES[name])
    assert answer.status_code == 200, answer.text
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).format == (BODIES[name].get("output_format") or "png").upper()
    ignored = [key for key in ("style", "moderation", "input_fidelity") if BODIES[name].get(key)]
    assert [warning.split()[0] for warning in answer.json()["warnings"]] == ignored


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("low", 10), ("medium", 20), ("standard", 20), ("auto", 20), ("high", 40), ("hd", 40), ("max", 50), (None, 20)],
)
def test_quality_is_a_preset_of_steps(client: TestClient, backend: Recorder, quality: Any, steps: int) -> None:
    answer = generate(client, quality=quality).json()
    assert backend.requests[0].steps == steps
    assert answer["quality"] == (quality or "auto")
    assert answer["usage"]["image_steps"] == steps
    assert any("limited to 50" in warning for warning in answer["warnings"]) == (quality == "max")
    answer = generate(client, quality=quality, num_inference_steps=7).json()
    assert backend.requests[1].steps == 7
    assert len(answer["warnings"]) == (quality not in (None, "auto"))


def test_compression_is_the_quality_of_lossy_files_and_named_where_it_is_ignored(client: TestClient) -> None:
    sizes = [
        len(generate(client, output_format="jpeg", output_compression=value, seed=200).json()["data"][0]["b64_json"])
        for value in (0, 100)
    ]
    assert sizes[0] < sizes[1]
    assert "png is lossless" in generate(client, output_compression=50).json()["warnings"][0]


def test_a_seed_of_minus_one_is_a_random_one(client: TestClient) -> None:
    seeds = {generate(client, seed=-1).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_the_end_user_is_named_in_the_answer(client: TestClient) -> None:
    assert generate(client, user="u", safety_identifier="s").json()["safety_identifier"] == "s"
    assert generate(client, user="u").json()["safety_identifier"] == "u"


def test_a_prompt_beyond_the_encoders_length_is_counted(client: TestClient) -> None:
    assert generate(client, prompt="x" * TOKEN_LIMIT).json()["warnings"] == []
    answer = generate(client, prompt="x" * (TOKEN_LIMIT + 12)).json()
    assert answer["warnings"] == ["the prompt has 42 tokens, of which the model sees the first 30; shorten it"]
    assert answer["usage"]["input_tokens"] == answer["usage"]["total_tokens"] == 42


@pytest.mark.parametrize(
    ("prompt", "model", "drawn", "mix"),
    [
        ("a cat <lora:style:0.5>", "base", "a cat", (("style", 0.5),)),
        ("a cat<lora:style>", {"counting": 0.25}, "a cat", (("counting", 0.25), ("style", 1.0))),
        ("a cat", None, "a cat", None),
    ],
)
def test_tags_add_experts_where_the_syntax_is_asked_for(
    client: TestClient, backend: Recorder, prompt: str, model: Any, drawn: str, mix: Any
) -> None:
    assert generate(client, prompt=prompt, model=model, prompt_syntax="a1111").status_code == 200
    assert (backend.requests[0].prompt, backend.requests[0].mix) == (drawn, mix)


@pytest.mark.parametrize(
    ("prompt", "model", "status", "message"),
    [
        ("a (cat:1.2)", None, 400, "weights such as '(cat:1.2)' cannot be applied"),
        ("a cat <lora:anime:1>", "base", 404, "'anime' is not served; names: counting, style"),
        ("a cat <lora:style:much>", "base", 400, "must be a number"),
        ("a cat <lora:style:9>", "base", 400, "weight of style must be from -2 to 2"),
        ("a cat <lora:style:1>", None, 400, "name model base"),
        ("<lora:style:1>", "base", 400, "words beside its tags"),
    ],
)
def test_other_syntax_is_refused_by_name(
    client: TestClient, prompt: str, model: Any, status: int, message: str
) -> None:
    answer = generate(client, prompt=prompt, model=model, prompt_syntax="a1111")
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_without_the_syntax_prompts_are_literal_and_a_warning_says_so(client: TestClient, backend: Recorder) -> None:
    for prompt in ("a (cat:1.2)", "a cat <lora:style:1>"):
        assert "literally" in generate(client, prompt=prompt).json()["warnings"][0]
        assert backend.requests[-1].prompt == prompt


def test_links_lead_to_images_for_whoever_has_them(backend: Recorder) -> None:
    client = client_for(backend, {KEY: None})
    answer = generate(client, response_format="url", seed=7, output_format="webp").json()
    (datum,) = answer["data"]
    assert datum["b64_json"] is None
    assert datum["url"].startswith("http://127.0.0.1:8000/v1/images/files/")
    linked = client.get(datum["url"], headers={"Authorization": ""})
    assert (linked.status_code, linked.headers["content-type"]) == (200, "image/webp")
    assert linked.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert Image.open(io.BytesIO(linked.content)).size == (16, 16)
    other = generate(client, response_format="url").json()["data"][0]["url"]
    for forged in (datum["url"][:-1], datum["url"].replace("expires=1", "expires=2"), datum["url"].split("?")[0],
                   other.split("?")[0] + "?" + datum["url"].split("?")[1]):  # fmt: skip
        assert client.get(forged).status_code == 403
    assert client_for(backend).get(datum["url"]).status_code == 403, "another process has other signatures"


def test_links_end_and_the_oldest_give_way() -> None:
    now_s = 1000.0
    config = ServingConfig(url_lifetime_s=60, public_url="https://images.example.com")
    store = ImageStore(1000, lambda: now_s)

    async def keep_image(image: StoredImage) -> None:
        store.keep(image)

    async def find(name: str) -> StoredImage | None:
        return store.get(name)

    links = ImageLinks(config, keep_image, find, b"secret", lambda: now_s)

    def keep(content: bytes) -> str:
        return asyncio.run(links.keep(content, "png", "http://asked"))

    def status(link: str) -> int:
        name, _, query = link.rpartition("/")[2].partition("?")
        values = dict(part.split("=") for part in query.split("&"))
        try:
            return asyncio.run(links.answer(name, values["expires"], values["signature"])).status_code
        except RequestError as error:
            return error.status

    first, second = (keep(b"x" * 400) for _ in range(2))
    assert first.startswith("https://images.example.com/v1/images/files/")
    assert [status(first), status(second)] == [200, 200]
    third = keep(b"x" * 400)
    assert [status(first), status(second), status(third)] == [404, 200, 200]
    now_s += 61
    assert status(third) == 404
    with pytest.raises(RequestError, match="larger than the store"):
        keep(b"x" * 1001)


def test_pages_of_named_origins_may_ask_and_no_others(backend: Recorder) -> None:
    preflight = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    client = client_for(backend, {KEY: None}, cors_origins=[ORIGIN])
    asked = client.options(PATH, headers=preflight | {"Authorization": ""})
    assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    assert "authorization" in asked.headers["Access-Control-Allow-Headers"].lower()
    answer = client.post(PATH, json={"prompt": "a cat"}, headers={"Origin": ORIGIN})
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
    refused = client.get("/v1/models", headers={"Origin": ORIGIN, "Authorization": ""})
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, ORIGIN), "readable refusals"
    stranger = client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in stranger.headers
    off = client_for(backend).get("/v1/models", headers={"Origin": ORIGIN})
    assert "Access-Control-Allow-Origin" not in off.headers


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/v1/models", "/page.js"])
def test_head_is_answered_as_get_without_its_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", get.headers["content-length"])


def test_headers_that_clients_read(backend: Recorder) -> None:
    client = client_for(backend, {KEY: 5})
    answers = [client.get("/v1/models") for _ in range(2)]
    assert answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["4", "3"]
    assert answers[1].headers["x-ratelimit-limit-requests"] == "5"
    assert answers[1].headers["x-ratelimit-reset-requests"] in ("23s", "24s")
    stream = generate(client, stream=True)
    assert stream.headers["X-Accel-Buffering"] == "no"
    completed = json.loads(stream.text.split("data: ")[-1])
    assert completed["usage"]["input_tokens"] == len("a cat")


class Slow(Recorder):
    async def generate(self, requests: Any, file_format: Any) -> Any:
        await asyncio.sleep(0.3)
        return await super().generate(requests, file_format)


def test_a_request_that_is_sent_again_is_drawn_once() -> None:
    backend = Slow()
    with client_for(backend, {KEY: None, "another-key-of-some-length": None}) as client:  # in one event loop
        again = {"Idempotency-Key": "order-1"}

        def post(body: Any, **headers: str) -> Any:
            return client.post(PATH, json=body, headers=headers)

        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda _: post({"prompt": "a cat"}, **again), range(3)))
        later = post({"prompt": "a cat"}, **again)
        assert len({answer.text for answer in (*together, later)}) == 1
        assert len(backend.requests) == 1
        reused = post({"prompt": "a dog"}, **again)
        assert (reused.status_code, reused.json()["error"]["code"]) == (409, "idempotency_key_reused")
        other = post({"prompt": "a cat"}, **again, Authorization="Bearer another-key-of-some-length")
        assert other.json()["data"][0]["seed"] != later.json()["data"][0]["seed"], "keys are a caller's own"
        backend.error = queue_full(2)
        second = {"Idempotency-Key": "order-2"}
        assert post({"prompt": "a bird"}, **second).status_code == 429
        backend.error = None
        assert post({"prompt": "a bird"}, **second).status_code == 200, "a refusal for now is not kept"
        assert post({"prompt": "a cat"}, **{"Idempotency-Key": "x" * 300}).status_code == 400


def test_bounds_are_in_the_description(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    body = schemas["GenerationBody"]["properties"]

    def bound(name: str, key: str) -> Any:
        return next(branch[key] for branch in body[name].get("anyOf", [body[name]]) if key in branch)

    assert (bound("prompt", "maxLength"), bound("n", "maximum"), bound("num_inference_steps", "maximum")) == (
        2000,
        10,
        50,
    )
    assert "questions" in body
    assert "AskedQuestion" in schemas


def post_bytes(
    client: TestClient, content: bytes, content_type: str | None = "application/json", path: str = PATH
) -> Any:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return client.post(path, content=content, headers=headers)


@pytest.mark.parametrize(
    ("content", "content_type", "status", "message"),
    [
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", 415, "Content-Type: application/json"),
        (b'{"prompt": "a"}', None, 415, "Content-Type: application/json; got none"),
        (b"", "application/json", 400, 'the body is empty; send JSON such as {"prompt"'),
        (b"[1]", "application/json", 400, "must be a JSON object, got a list"),
        (b'{"prompt": }', "application/json", 400, ": expected value at line 1"),
        (b'{"prompt": "a", "model": {"counting": "1"}}', "application/json", 400, "model.counting"),
        (b'{"prompt": "a", "model": {"counting": 3}}', "application/json", 400, "weight of counting must be from -2"),
        (b'{"prompt": "a", "negative_prompt": "\\ud800"}', "application/json", 400, "surrogate"),
        (b'{"prompt": "\\udfff"}', "application/json", 400, "surrogate"),
        (b'{"prompt": "a", "model": {"\\ud800": 1}}', "application/json", 400, "surrogate"),
        (b'{"\\ud800": "a"}', "application/json", 400, "surrogate"),
    ],
)  # fmt: skip
def test_messages_say_what_to_change(
    client: TestClient, content: bytes, content_type: str | None, status: int, message: str
) -> None:
    answer = post_bytes(client, content, content_type)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_fault_inside_a_question_says_which(client: TestClient) -> None:
    image = base64.b64encode(encode(picture(9), PNG)).decode()
    questions = [{"id": 1, "question": "a?"}, {"id": 2, "question": "b?", "parents": [-1]}]
    answer = client.post("/v1/scores", json={"prompt": "a", "image": image, "questions": questions})
    assert answer.json()["error"]["message"].startswith("questions[1].parents[0] must be")
    assert answer.json()["error"]["param"] == "questions"


def test_the_best_of_a_prompt_that_cannot_be_judged_is_refused_before_drawing(
    client: TestClient, backend: Recorder
) -> None:
    backend.score_error = invalid_request("no questions; send questions", "prompt", "unsupported_caption", 422)
    assert generate(client, best_of=3).status_code == 422
    assert not backend.requests
    backend.score_error = None
    asked = [{"id": 1, "question": "Is there a cat?"}]
    assert generate(client, best_of=3, questions=asked).status_code == 200
    assert backend.asked_questions[-1] == [
        {"id": 1, "question": "Is there a cat?", "category": "question", "parents": []}
    ]


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("/v1/scores", b'{"prompt": "a", "images": [' + b'"",' * 2_000_000 + b'""]}', None),
        ("/v1/scores", b'{"prompt": "a", "images": [' + b'"",' * 90_000 + b'""]}', "images"),
        (PATH, b'{"prompt": "a"' + b"".join(b',"k%d":1' % key for key in range(1_400_000)) + b"}", None),
        (PATH, b'{"prompt": "a"' + b"".join(b',"k%d":1' % key for key in range(90_000)) + b"}", None),
        (PATH, b'{"prompt": "a", "model": {' + b",".join(b'"k%d":1' % key for key in range(400_000)) + b"}}", None),
        (PATH, b'{"prompt": "a", "model": {' + b",".join(b'"k%d":1' % key for key in range(65)) + b"}}", "model"),
        (PATH, b'{"prompt": "a", "svg": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "svg"),
    ],
    ids=["strings", "strings, fewer", "keys", "keys, fewer", "mix", "mix, fewer", "deep"],
)  # fmt: skip
def test_counts_are_bounded_before_anything_is_validated(
    backend: Recorder, path: str, content: bytes, param: str | None
) -> None:
    client = client_for(backend, max_body_mb=30)
    started_s = time.process_time()
    answer = post_bytes(client, content, path=path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(answer.content) < 500
    assert time.process_time() - started_s < 1, "of the 8 to 16 s that such bodies took"


def test_base64_with_line_breaks_is_accepted(client: TestClient) -> None:
    text = base64.encodebytes(encode(picture(51), PNG)).decode()
    assert "\n" in text
    answer = client.post("/v1/scores", json={"prompt": "a", "image": text})
    assert answer.json()["data"][0]["scores"] == {"dsg": 0.2}
