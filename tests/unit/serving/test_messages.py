"""What a person reads who sent something wrong: the parameter, the rule, what was given, and what to do."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import Recorder

CONFIG = ServingConfig(sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64), max_steps=50)
DRAW, SCORE = "/v1/images/generations", "/v1/scores"


@pytest.fixture
def client(backend: Recorder) -> TestClient:
    app = build_app(backend, CONFIG, ModelNames("merged", base=True, experts=("counting",)), ())
    return TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5), raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "a"}, "unknown parameter: promt; did you mean prompt?"),
        ({"cfg_scale": 5}, "unknown parameter: cfg_scale; it is guidance_scale here"),
        ({"width": 512}, "unknown parameter: width; it is size (WIDTHxHEIGHT) here"),
        ({"loras": []}, "unknown parameter: loras; it is model (experts with weights) here"),
        ({"denoising_strength": 0.5}, "unknown parameter: denoising_strength"),
        ({"steps": 5, "num_inference_steps": 6}, "unknown parameter: steps; it is num_inference_steps here"),
        ({"prompt": None}, "prompt must be a valid string, got null"),
        ({"prompt": ["a"]}, "prompt must be a valid string, got a list"),
        ({"prompt": ""}, 'prompt must have at least 1 character, got ""'),
        ({"n": "2"}, 'n must be a valid integer, got "2"'),
        ({"n": 0}, "n must be greater than or equal to 1, got 0"),
        ({"n": 11}, "n must be at most 10, got 11"),
        ({"guidance_scale": 100}, "guidance_scale must be at most 30, got 100"),
        ({"guidance_scale": 30.5}, "guidance_scale must be at most 30, got 30.5"),
        ({"size": "64X64"}, "size must read WIDTHxHEIGHT, such as 64x64, or auto, got '64X64'"),
        ({"size": 512}, "size must be a valid string, got 512"),
        ({"output_format": "jpg"}, "output_format must be 'png', 'webp' or 'jpeg', got \"jpg\""),
        ({"model": ["counting"]}, 'model must be a name, or experts with weights such as {"NAME": 0.5}, got a list'),
        ({"model": {"counting": "1"}}, 'model.counting must be a valid number, got "1"'),
        ({"model": {"counting": 3}}, "model: the weight of counting must be from -2 to 2, got 3"),
        ({"model": {"style": 1}}, "model 'style' is not served; names: counting"),
        ({"model": "dall-e-3"}, "model 'dall-e-3' is not served; names: merged, base, counting"),
        ({"seed": 2**60}, "seed must be less than or equal to 9007199254740991, got 1152921504606846976"),
        ({"stream": "yes"}, 'stream must be a valid boolean, got "yes"'),
        ({"negative_prompt": {"a": 1}}, "negative_prompt must be a valid string, got an object"),
        ({"questions": ["Is it?"]}, 'questions[0] must be an object, got "Is it?"'),
        ({"questions": [{"id": 1, "question": "a?"}, {"id": 2, "question": ""}]},
         'questions[1].question must have at least 1 character, got ""'),
        ({"questions": [{"id": 1, "question": "a?", "parent": 1}]}, "unknown parameter: questions[0].parent"),
        ({"style": "x" * 50}, "style must be 'vivid' or 'natural'"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named_with_its_rule_and_what_was_given(
    client: TestClient, backend: Recorder, changes: dict[str, Any], message: str
) -> None:
    answer = client.post(DRAW, json={"prompt": "a cat"} | changes)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"] == message
    assert not backend.requests


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'prompt': 'a'}", "names and texts stand in double quotes"),
        (b'{"prompt": "a",}', "trailing comma at line 1 column 16"),
        ("{}".encode("utf-16"), "it is UTF-16, encode it as UTF-8"),
        (b'{"prompt": "\\ud83d"}', "must have its other half"),
        (b'"a cat"', "the body must be a JSON object, got a string"),
    ],
)
def test_a_body_that_is_no_json_says_what_to_change(client: TestClient, content: bytes, message: str) -> None:
    answer = client.post(DRAW, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_byte_order_mark_is_no_fault(client: TestClient) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"prompt": "a"}).encode()
    assert client.post(DRAW, content=content, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize("scale", [7.55, 0, 1, 0.1 + 0.2, 29.999])
def test_any_guidance_within_the_bound_is_taken(client: TestClient, backend: Recorder, scale: float) -> None:
    assert client.post(DRAW, json={"prompt": "a cat", "guidance_scale": scale}).status_code == 200
    assert backend.requests[0].guidance_scale == scale


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/images/generations", 404, "POST /images/generations is not served here; did you mean /v1/images/generations?"),
        ("POST", "/v1/image/generations", 404, "POST /v1/image/generations is not served here; did you mean /v1/images/generations?"),
        ("GET", DRAW, 405, f"GET {DRAW} is not served here; send POST"),
        ("POST", "/v1/chat/completions", 404, "POST /v1/chat/completions is not served here"),
    ],
)  # fmt: skip
def test_a_wrong_address_is_told_the_right_one(
    client: TestClient, method: str, path: str, status: int, message: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)
