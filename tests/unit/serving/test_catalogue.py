"""Several runs behind one service: each is asked for by name and drawn as its own recipe says."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.catalogue import Entry
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.metadata import metadata_of
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import Recorder

CONFIG = ServingConfig(sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64))
LARGE = ServingConfig(sampling=SamplingConfig(steps=4, guidance_scale=1.0, width_px=128, height_px=128))
ANIME = ModelNames("anime", base=True, experts=("counting", "lines"), prefix="anime/")
OWN = ModelNames("merged", base=True, experts=("counting", "style"))
ALL = ["merged", "base", "counting", "style", "anime", "anime/base", "anime/counting", "anime/lines"]


@pytest.fixture
def client(backend: Recorder) -> TestClient:
    app = build_app(backend, CONFIG, OWN, (), others={"anime": Entry(ANIME, LARGE, "anime")})
    return TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5))


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/images/generations", json={"prompt": "a cat", "seed": 1} | body)


def test_all_models_are_listed(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ALL
    assert {model["id"]: model["kind"] for model in models}["anime/counting"] == "expert"
    assert client.get("/v1/models/anime").json()["kind"] == "merged"
    assert client.get("/v1/models/anime/lines").json()["id"] == "anime/lines"
    assert client.get("/v1/models/anime/style").status_code == 404


@pytest.mark.parametrize(
    ("model", "run", "mix"),
    [
        (None, "", None),
        ("merged", "", None),
        ("counting", "", (("counting", 1.0),)),
        ("anime", "anime", None),
        ("anime/base", "anime", ()),
        ("anime/counting", "anime", (("counting", 1.0),)),
        ({"anime/lines": 0.5, "anime/counting": 0.25}, "anime", (("counting", 0.25), ("lines", 0.5))),
        ({"style": 0.5}, "", (("style", 0.5),)),
    ],
)
def test_a_model_is_drawn_by_its_run_and_sampled_as_that_says(
    client: TestClient, backend: Recorder, model: Any, run: str, mix: Any
) -> None:
    answer = generate(client, model=model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "merged")
    steps, guidance, side = (4, 1.0, 128) if run else (20, 2.0, 64)
    assert backend.requests == [ImageRequest("a cat", 1, steps, guidance, side, side, "", mix=mix, run=run)]


def test_tags_in_the_prompt_add_experts_of_the_run(client: TestClient, backend: Recorder) -> None:
    body = {"prompt": "a cat <lora:lines:0.5>", "model": "anime/base", "prompt_syntax": "a1111"}
    assert generate(client, **body).status_code == 200
    assert (backend.requests[0].run, backend.requests[0].mix) == ("anime", (("lines", 0.5),))


def test_an_unknown_name_is_404_with_all_the_names(client: TestClient) -> None:
    for model in ("nime", "anime/style", "other/counting"):
        refused = generate(client, model=model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert refused.json()["error"]["message"] == f"model {model!r} is not served; names: {', '.join(ALL)}"
    refused = generate(client, model={"anime/style": 1.0})
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("names: anime/counting, anime/lines")


def test_a_mix_of_two_runs_is_refused(client: TestClient, backend: Recorder) -> None:
    refused = generate(client, model={"anime/lines": 0.5, "style": 0.5})
    assert refused.status_code == 400
    assert "one run, these are of anime, merged" in refused.json()["error"]["message"]
    assert backend.requests == []


def test_sizes_are_bounded_by_the_run_s_own(client: TestClient) -> None:
    assert generate(client, size="160x160").status_code == 400
    assert generate(client, size="160x160", model="anime").status_code == 200


def test_names_of_adapters_that_a_run_was_given_later_are_learnt(client: TestClient, backend: Recorder) -> None:
    backend.stats = [{"experts": ["counting"], "run": ""}, {"experts": ["lines", "new"], "run": "anime"}]
    assert generate(client, model="anime/new").status_code == 200
    assert generate(client, model="new").status_code == 404


@pytest.mark.parametrize(
    ("mix", "shown"),
    [
        (None, "anime"),
        ((), "anime/base"),
        ((("lines", 1.0),), "anime/lines"),
        ((("lines", 0.5),), '{"anime/lines": 0.5}'),
    ],
)
def test_files_say_what_to_ask_for_to_get_the_image_again(mix: Any, shown: str) -> None:
    request = ImageRequest("a cat", 1, 4, 1.0, 64, 64, mix=mix, run="anime")
    assert metadata_of(request, ANIME, "DDIMScheduler")["model"] == shown
