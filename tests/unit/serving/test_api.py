"""The HTTP API over a backend that answers at once: shapes, bounds, refusals."""

import asyncio
import base64
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from selma_ray.errors import ConfigError
from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, FileFormat, decode_upload, encode
from selma_ray.serving.errors import RequestError, queue_full, unavailable
from selma_ray.serving.guards import LimitBody
from selma_ray.serving.keys import ApiKey, Bucket, find_key, new_key, read_keys
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import Recorder, picture

NAMES = ModelNames("merged", base=True, experts=("counting", "style"))
KEY = "a-key-of-sufficient-length"
CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64, negative_prompt="blurry"),
    max_steps=50, max_prompt_chars=40, max_images=3, max_size_px=256, max_body_mb=0.001, max_previews=4,
)  # fmt: skip


def red_of(b64_json: str) -> int:
    return decode_upload(base64.b64decode(b64_json), 10**6).getpixel((0, 0))[0]  # type: ignore[index]


@pytest.fixture
def client(backend: Recorder) -> TestClient:
    return client_for(backend)


def client_for(
    backend: Recorder, keys: Sequence[str] = (), peer: str = "127.0.0.1", requests_per_minute: int | None = None
) -> TestClient:
    known = [ApiKey(hashlib.sha256(key.encode()).digest(), requests_per_minute) for key in keys]
    app = build_app(backend, CONFIG, NAMES, known)
    return TestClient(app, "http://127.0.0.1:8000", client=(peer, 50000), raise_server_exceptions=False)


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/images/generations", json={"prompt": "a cat"} | body)


def test_a_request_that_names_nothing_takes_the_defaults(client: TestClient, backend: Recorder) -> None:
    answer = generate(client)
    assert answer.status_code == 200, answer.text
    (request,) = backend.requests
    assert request == ImageRequest("a cat", request.seed, 20, 2.0, 64, 64, "blurry")
    (datum,) = answer.json()["data"]
    assert datum["scores"] is None
    assert (datum["seed"], answer.json()["size"], answer.json()["model"]) == (request.seed, "64x64", "merged")


def test_every_parameter_is_heard(client: TestClient, backend: Recorder) -> None:
    answer = generate(
        client, model="merged", n=2, size="128x32", response_format="b64_json", output_format="jpeg", user="me",
        negative_prompt="", num_inference_steps=7, guidance_scale=0, seed=9, quality="auto",
    )  # fmt: skip
    assert backend.requests == [ImageRequest("a cat", seed, 7, 0, 128, 32, "") for seed in (9, 10)]
    assert answer.json()["output_format"] == "jpeg"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 41}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"negative_prompt": "x" * 41}, "negative_prompt"),
        ({"n": 0}, "n"),
        ({"n": 4}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "64x"}, "size"),
        ({"size": "64x60"}, "size"),
        ({"size": "64x512"}, "size"),
        ({"size": "8x8"}, "size"),
        ({"size": "٦٤x64"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"response_format": "file"}, "response_format"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "svg"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"frame_count": 2}, "frame_count"),
        ({"quality": "splendid"}, "quality"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"stream": 1}, "stream"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "partial_images": 5}, "partial_images"),
        ({"best_of": 4}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"metric": ""}, "metric"),
        ({"model": 1}, "model"),
        ({"model": {"counting": 3}}, "model"),
        ({"model": {"counting": "1"}}, "model"),
        ({"prompts": "a dog"}, "prompts"),
    ],
)
def test_a_bad_parameter_is_named(client: TestClient, backend: Recorder, body: dict[str, Any], param: str) -> None:
    answer = generate(client, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"]
    assert not backend.requests


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
        (b'{"prompt": "a", "model": {"counting": NaN}}', "model"),
    ],
)
def test_values_that_json_readers_let_through_are_refused(client: TestClient, content: bytes, param: str) -> None:
    answer = client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 900, b'{"prompt": "a", "seed": ' + b"9" * 900 + b"}"]
)
def test_a_body_that_is_no_object_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_or_path_is_404(client: TestClient) -> None:
    assert generate(client, model="dall-e-3").status_code == 404
    assert generate(client, model="dall-e-3").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert client.get("/v1/images/generations").status_code == 405


@pytest.mark.parametrize(
    ("model", "mix"),
    [
        (None, None),
        ("merged", None),
        ("base", ()),
        ("style", (("style", 1.0),)),
        ({"style": 0.4, "counting": 0.6}, (("counting", 0.6), ("style", 0.4))),
        ({"style": -1, "counting": 0}, (("style", -1.0),)),
        ({}, ()),
    ],
)
def test_a_model_is_a_name_or_a_mix_of_experts(client: TestClient, backend: Recorder, model: Any, mix: Any) -> None:
    answer = generate(client, model=model)
    assert [request.mix for request in backend.requests] == [mix]
    assert answer.json()["model"] == ("merged" if model is None else model)


def test_a_mix_of_what_is_no_expert_is_404(client: TestClient) -> None:
    for model in ({"merged": 1}, {"base": 1.0}, {"unheard": 0.5}):
        error = generate(client, model=model).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "counting, style" in error["message"]


def test_models_are_listed_with_their_kinds(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    kinds = {"merged": "merged", "base": "base", "counting": "expert", "style": "expert"}
    assert {model["id"]: model["kind"] for model in listed} == kinds


def test_a_model_is_described_by_its_name(client: TestClient) -> None:
    assert client.get("/v1/models/style").json() | {"created": 0} == {
        "id": "style", "created": 0, "kind": "expert", "object": "model", "owned_by": "selma_ray",
    }  # fmt: skip
    answer = client.get("/v1/models/dall-e-3")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def events(answer: Any) -> list[dict[str, Any]]:
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    return [json.loads(block.split("data: ", 1)[1]) for block in answer.text.split("\n\n") if block]


def test_partial_images_are_streamed_before_the_finished_one(client: TestClient) -> None:
    answer = generate(client, stream=True, partial_images=2, seed=9, output_format="webp")
    streamed = events(answer)
    names = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event["type"] for event in streamed] == names
    assert [event["partial_image_index"] for event in streamed[:2]] == [0, 1]
    assert (streamed[2]["size"], streamed[2]["output_format"], streamed[2]["seed"]) == ("64x64", "webp", 9)
    assert answer.text.startswith("event: image_generation.partial_image\ndata: ")


def test_a_refusal_before_the_first_event_is_an_ordinary_one(client: TestClient, backend: Recorder) -> None:
    backend.error = queue_full(retry_after_s=2)
    assert generate(client, stream=True).status_code == 429


@pytest.mark.parametrize(
    ("error", "code"),
    [(unavailable("generator"), "generator_unavailable"), (ZeroDivisionError("/root"), "internal_error")],
)
def test_a_stream_that_breaks_says_so(client: TestClient, backend: Recorder, error: Exception, code: str) -> None:
    backend.score_error = error
    answer = generate(client, stream=True)
    assert [event["type"] for event in events(answer)] == ["image_generation.completed", "error"]
    assert events(answer)[-1]["error"]["code"] == code
    assert "/root" not in answer.text


def test_the_best_of_several_are_returned_with_all_scores(client: TestClient, backend: Recorder) -> None:
    answer = generate(client, n=2, best_of=3, seed=0, output_format="webp", metric="soft_dsg").json()
    # Seed 0 gives no red, which is a score that could not be read: it comes last.
    assert [datum["seed"] for datum in answer["data"]] == [2, 1]
    assert answer["data"][0]["scores"] == {"soft_dsg": 2 / 255}
    assert [candidate["scores"]["soft_dsg"] for candidate in answer["candidates"]] == [None, 1 / 255, 2 / 255]
    ((images, metrics),) = backend.scored
    assert metrics == ["soft_dsg"]
    assert [decode_upload(image, 256).getpixel((0, 0))[0] for image in images] == [0, 1, 2]  # type: ignore[index]
    assert base64.b64decode(answer["data"][0]["b64_json"])[8:12] == b"WEBP"


def test_without_an_evaluator_images_are_drawn_and_the_best_is_not_known(client: TestClient, backend: Recorder) -> None:
    backend.score_error = unavailable("evaluator")
    assert generate(client).status_code == 200
    answer = generate(client, best_of=2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "evaluator_unavailable")


def test_a_full_queue_says_when_to_come_back(client: TestClient, backend: Recorder) -> None:
    backend.error = queue_full(retry_after_s=2)
    answer = generate(client)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_an_unexpected_error_shows_nothing_of_its_inside(client: TestClient, backend: Recorder) -> None:
    backend.error = RuntimeError("secret path /root")
    answer = generate(client)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_a_body_beyond_the_bound_is_413_declared_or_not(client: TestClient) -> None:
    long = b'{"prompt": "' + b"x" * 2000 + b'"}'
    assert client.post("/v1/images/generations", content=long).status_code == 413

    def chunks() -> Iterator[Any]:
        yield long[:900]
        yield long[900:]

    assert client.post("/v1/images/generations", content=chunks()).status_code == 413


def test_a_body_that_does_not_arrive_is_408() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    guard = LimitBody(lambda *_: None, max_bytes=100, timeout_s=0.01)
    asyncio.run(guard({"type": "http", "headers": []}, receive, send))
    assert sent[0]["status"] == 408


def score(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/scores", json={"prompt": "a cat"} | body)


def test_scores(client: TestClient, backend: Recorder) -> None:
    image = base64.b64encode(encode(picture(51), PNG)).decode()
    for text in (image, "data:image/png;base64," + image):
        answer = score(client, image=text).json()
        scored = {"scores": {"dsg": 0.2}, "reasons": {}, "questions": []}
        assert answer == {"object": "list", "prompt": "a cat", "judge": "red", "data": [scored]}
    other = base64.b64encode(encode(picture(255), PNG)).decode()
    answer = score(client, images=[image, other], metrics=["dsg", "soft_dsg", "dsg"]).json()
    assert [entry["scores"] for entry in answer["data"]] == [{"dsg": 0.2, "soft_dsg": 0.2}, {"dsg": 1, "soft_dsg": 1}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"image": "not base64!"}, "image"),
        ({"images": ["not base64!"]}, "images"),
        ({"images": []}, "images"),
        ({"images": ["aaaa"] * 4}, "images"),
        ({}, "image"),
        ({"image": "aaaa", "images": ["aaaa"]}, "image"),
        ({"image": "aaaa", "metrics": []}, "metrics"),
        ({"image": "aaaa", "prompt": "x" * 41}, "prompt"),
    ],
)
def test_what_cannot_be_scored_is_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    answer = score(client, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_key_is_required_where_there_are_any(backend: Recorder) -> None:
    client = client_for(backend, ["another-key-of-some-length", KEY], peer="203.0.113.7")
    for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer "):
        answer = client.get("/v1/models", headers={"Authorization": header})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"][0]["id"] == "merged"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("203.0.113.7", 401), ("10.0.0.1", 401)]
)
def test_without_keys_only_this_machine_is_answered(backend: Recorder, peer: str, status: int) -> None:
    assert client_for(backend, peer=peer).get("/v1/models").status_code == status


def test_without_keys_a_browser_sent_here_under_another_name_is_refused(client: TestClient) -> None:
    for host, status in (("evil.example", 400), ("evil.example:8000", 400), ("localhost", 200), ("[::1]:8000", 200)):
        assert client.get("/v1/models", headers={"Host": host}).status_code == status


def test_every_response_is_data_that_browsers_keep_to_themselves(client: TestClient, backend: Recorder) -> None:
    backend.error = RuntimeError("a fault of ours")
    answers = [client.get("/v1/models"), client.get("/nothing"), generate(client), client.get("/"), client.put("/")]
    assert [answer.status_code for answer in answers] == [200, 404, 500, 200, 405]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cache-Control"] == "no-store"
    assert answers[4].headers["Allow"] == "GET"


def test_the_page_is_open_to_whoever_has_no_key_yet(backend: Recorder) -> None:
    client = client_for(backend, [KEY], peer="203.0.113.7")
    for path in ("/", "/page.css", "/page.js", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    assert client.get("/metrics").status_code == 401


def test_readiness_is_the_generators(client: TestClient, backend: Recorder) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    backend.error = unavailable("generator")
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_a_key_may_be_used_so_often(backend: Recorder) -> None:
    client = client_for(backend, [KEY, "another-key-of-some-length"], requests_per_minute=2)
    answers = [client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    other = {"Authorization": "Bearer another-key-of-some-length"}
    assert client.get("/v1/models", headers=other).status_code == 200


def test_a_bucket_refills_evenly_and_not_above_its_limit() -> None:
    now_s = 0.0
    bucket = Bucket(2, lambda: now_s)
    assert [bucket.take(), bucket.take(), bucket.take()] == [0, 0, 30]
    now_s = 15.0
    assert bucket.take() == 15
    now_s = 1000.0
    assert [bucket.take(), bucket.take(), bucket.take()] == [0, 0, 30]


def test_metrics(client: TestClient, backend: Recorder) -> None:
    generate(client, best_of=2, seed=50)
    generate(client, n=0)
    client.get("/anything/at/all")
    backend.stats = [
        {"replica": "a1", "in_flight": 3, "waiting": 1, "steps": 5, "image_steps": 14, "images": 2, "busy_s": 0.5,
         "occupancy": {2: 3, 4: 2}, "row_step_s": 0.1, "start_s": 1.5, "swap_s": 0.0}
    ]  # fmt: skip
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'selma_http_requests_total{method="POST",route="/v1/images/generations",status="200"} 1.0',
        'selma_http_requests_total{method="POST",route="/v1/images/generations",status="400"} 1.0',
        'selma_http_requests_total{method="GET",route="unknown",status="404"} 1.0',
        'selma_http_request_seconds_count{route="/v1/images/generations"} 2.0',
        "selma_images_total 2.0",
        'selma_score_count{metric="dsg"} 2.0',
        'selma_engine_waiting{replica="a1"} 1.0',
        'selma_engine_steps_total{replica="a1"} 5.0',
        'selma_engine_steps_per_busy_second{replica="a1"} 10.0',
        'selma_engine_batch_images_bucket{le="2.0",replica="a1"} 3.0',
        'selma_engine_batch_images_bucket{le="+Inf",replica="a1"} 5.0',
        'selma_engine_batch_images_sum{replica="a1"} 14.0',
    ):
        assert line in lines
    backend.error = unavailable("generator")
    assert client.get("/metrics").status_code == 200


def test_key_files(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode())
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n\nsha256:{digest.hexdigest()} 30\n  {KEY}  \n")
    assert read_keys(file, 60) == (ApiKey(digest.digest(), 30), ApiKey(digest.digest(), 60))
    own, accepted = new_key()
    assert find_key([*read_keys(file), accepted], f"Bearer {own}") == accepted


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_key_files_of_other_systems(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"{mark}{KEY}\r\n".encode())
    assert find_key(read_keys(file), f"Bearer {KEY}") is not None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("# none\n", "at least one key"),
        ("ok-key-of-some-length\nshort\n", "line 2"),
        ("ok-key-of-some-length\nschlüssel-mit-umlauten\n", "line 2 must be a key of ASCII characters"),
        ("ok-key-of-some-length often\n", "number of requests a minute"),
        ("ok-key-of-some-length 0\n", "number of requests a minute"),
        ("ok-key-of-some-length 3 4\n", "number of requests a minute"),
    ],
)
def test_unusable_key_files(tmp_path: Path, content: str, match: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=match):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_encoded_images_are_read_back(output_format: Any) -> None:
    image = Image.new("RGB", (24, 16), (200, 30, 40))
    decoded = decode_upload(encode(image, FileFormat(output_format)), max_pixels=24 * 16)
    assert (decoded.mode, decoded.size) == ("RGB", (24, 16))
    assert all(abs(got - want) <= 8 for got, want in zip(decoded.getpixel((3, 3)), (200, 30, 40), strict=True))  # type: ignore[arg-type]


def saved(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


PNG_FILE = saved(Image.new("RGB", (16, 16)), "PNG")


@pytest.mark.parametrize(
    "content", [b"", b"text", PNG_FILE[:60], PNG_FILE[:-20], saved(Image.new("RGB", (16, 16)), "BMP"), b"<svg/>"]
)
def test_what_is_no_sound_image_is_refused(content: bytes) -> None:
    with pytest.raises(RequestError, match="PNG, JPEG or WebP") as refusal:
        decode_upload(content, max_pixels=1000)
    assert refusal.value.status == 400


def test_an_image_is_refused_by_its_header_when_it_is_too_large() -> None:
    # A header that claims 2^30 x 2^30 pixels, over the same few bytes of data.
    header = PNG_FILE[12:16] + (2**30).to_bytes(4, "big") * 2 + PNG_FILE[24:29]
    bomb = PNG_FILE[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG_FILE[33:]
    for content, max_pixels in ((PNG_FILE, 255), (bomb, 1000)):
        with pytest.raises(RequestError) as refusal:
            decode_upload(content, max_pixels)
        assert refusal.value.status == 413
