"""The HTTP API over a backend that answers at once: shapes, bounds, refusals."""

import base64
import hashlib
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from selma_ray.errors import ConfigError
from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import decode_upload, encode
from selma_ray.serving.errors import RequestError, queue_full
from selma_ray.serving.keys import first_key, read_key_digests
from selma_ray.serving.requests import ImageRequest

KEY = "a-key-of-sufficient-length"
CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64, negative_prompt="blurry"),
    max_steps=50, max_prompt_chars=40, max_images=3, max_size_px=256, max_body_mb=0.001,
)  # fmt: skip


class Recorder:
    """Answers at once and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []
        self.error: Exception | None = None

    async def generate(self, requests: Sequence[ImageRequest], output_format: str) -> list[bytes]:
        if self.error:
            raise self.error
        self.requests += requests
        return [f"{output_format} {request.seed}".encode() for request in requests]

    async def score(self, prompt: str, image: bytes) -> dict[str, Any]:
        return {"score": len(image) / 10, "judge": "length", "questions": []}


@pytest.fixture
def backend() -> Recorder:
    return Recorder()


@pytest.fixture
def client(backend: Recorder) -> TestClient:
    return client_for(backend)


def client_for(backend: Recorder, keys: Sequence[str] = (), peer: str = "127.0.0.1") -> TestClient:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    app = build_app(backend, CONFIG, "merged", digests)
    return TestClient(app, client=(peer, 50000), raise_server_exceptions=False)


def generate(client: TestClient, **body: Any):
    return client.post("/v1/images/generations", json={"prompt": "a cat"} | body)


def test_a_request_that_names_nothing_takes_the_defaults(client: TestClient, backend: Recorder) -> None:
    answer = generate(client)
    assert answer.status_code == 200
    (request,) = backend.requests
    assert request == ImageRequest("a cat", request.seed, 20, 2.0, 64, 64, "blurry")
    (datum,) = answer.json()["data"]
    assert base64.b64decode(datum["b64_json"]) == f"png {request.seed}".encode()
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
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"stream": True}, "stream"),
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
        (b'{"prompt": "\\ud800"}', "prompt"),  # half a character
    ],
)
def test_values_that_json_readers_let_through_are_refused(client: TestClient, content: bytes, param: str) -> None:
    answer = client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_or_path_is_404(client: TestClient) -> None:
    assert generate(client, model="dall-e-3").status_code == 404
    assert generate(client, model="dall-e-3").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert client.get("/v1/images/generations").status_code == 405


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

    def chunks():
        yield long[:900]
        yield long[900:]

    assert client.post("/v1/images/generations", content=chunks()).status_code == 413


def test_scores(client: TestClient) -> None:
    for image in (base64.b64encode(b"12345").decode(), "data:image/png;base64," + base64.b64encode(b"12345").decode()):
        answer = client.post("/v1/scores", json={"prompt": "a cat", "image": image})
        assert answer.json() == {"prompt": "a cat", "score": 0.5, "judge": "length", "questions": []}
    answer = client.post("/v1/scores", json={"prompt": "a cat", "image": "not base64!"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


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


def test_responses_are_not_to_be_stored_or_sniffed(client: TestClient) -> None:
    for answer in (client.get("/v1/models"), client.get("/nothing")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


def test_key_files(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode())
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n\nsha256:{digest.hexdigest()}\n  {KEY}  \n")
    assert read_key_digests(file) == (digest.digest(), digest.digest())
    assert first_key(file) == KEY


@pytest.mark.parametrize(
    ("content", "match"), [("# none\n", "at least one key"), ("ok-key-of-some-length\nshort\n", "line 2")]
)
def test_unusable_key_files(tmp_path: Path, content: str, match: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=match):
        read_key_digests(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_digests(tmp_path / "missing")


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_encoded_images_are_read_back(output_format: Any) -> None:
    image = Image.new("RGB", (24, 16), (200, 30, 40))
    decoded = decode_upload(encode(image, output_format), max_pixels=24 * 16)
    assert (decoded.mode, decoded.size) == ("RGB", (24, 16))
    assert all(abs(got - want) <= 8 for got, want in zip(decoded.getpixel((3, 3)), (200, 30, 40), strict=True))


def saved(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


PNG = saved(Image.new("RGB", (16, 16)), "PNG")


@pytest.mark.parametrize(
    "content", [b"", b"text", PNG[:60], PNG[:-20], saved(Image.new("RGB", (16, 16)), "BMP"), b"<svg/>"]
)
def test_what_is_no_sound_image_is_refused(content: bytes) -> None:
    with pytest.raises(RequestError, match="PNG, JPEG or WebP") as refusal:
        decode_upload(content, max_pixels=1000)
    assert refusal.value.status == 400


def test_an_image_is_refused_by_its_header_when_it_is_too_large() -> None:
    # A header that claims 2^30 x 2^30 pixels, over the same few bytes of data.
    header = PNG[12:16] + (2**30).to_bytes(4, "big") * 2 + PNG[24:29]
    bomb = PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]
    for content, max_pixels in ((PNG, 255), (bomb, 1000)):
        with pytest.raises(RequestError) as refusal:
            decode_upload(content, max_pixels)
        assert refusal.value.status == 413
