"""Requests made from the published OpenAPI description, and mutations of them: answered as described, never with a fault."""

import hashlib
import random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import Recorder

CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64), max_body_mb=0.1, max_images=2
)
KEY = "a-key-of-sufficient-length"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Bounds of the service's configuration are refused beyond those that the description states.
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SEEDS = (
    b'{"prompt": "a cat", "n": 1, "size": "64x64", "seed": 7, "model": {"counting": 0.5}, "output_format": "png"}',
    b'{"prompt": "a cat", "stream": true, "partial_images": 2, "guidance_scale": 2.5, "best_of": null}',
    b'{"prompt": "a cat", "images": ["aGVsbG8="], "metrics": ["dsg"]}',
    b'{"prompt": "a cat", "image": "aGVsbG8=", "questions": [{"id": 1, "question": "Is there a cat?", "parents": [0]}]}',
)


def app() -> Any:
    key = ApiKey(hashlib.sha256(KEY.encode()).digest())
    return build_app(Recorder(), CONFIG, ModelNames("merged", base=True, experts=("counting",)), (key,))


def check_openapi(num_examples: int) -> None:
    application = app()
    schema = schemathesis.openapi.from_asgi("/openapi.json", application, headers=HEADERS)
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]

        @settings(
            max_examples=num_examples, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def answered_as_described(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=HEADERS, checks=CHECKS)

        answered_as_described()


def check_mutations(count: int) -> None:
    client = TestClient(app(), headers=HEADERS)
    rng = random.Random(0)
    for _ in range(count):
        body = bytearray(rng.choice(SEEDS))
        for _ in range(rng.randint(1, 6)):
            position = rng.randrange(len(body))
            body[position : position + rng.choice((0, 1, 1, 4))] = rng.choice(
                (b"", b"\x00", b'"', b"{", b"1e400", b"null", b"\xff", bytes([rng.randrange(256)]))
            )
        path = rng.choice(("/v1/images/generations", "/v1/scores"))
        answer = client.post(path, content=bytes(body), headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413, 422), (path, bytes(body), answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_answers_are_as_described() -> None:
    check_openapi(num_examples=40)


def test_mutated_bodies_are_refused_and_not_tripped_over() -> None:
    check_mutations(1000)


@pytest.mark.heavy
def test_ten_thousand_requests() -> None:
    check_openapi(num_examples=1000)
    check_mutations(8000)
