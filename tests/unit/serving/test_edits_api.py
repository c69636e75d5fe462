"""POST /v1/images/edits: forms as OpenAI's own client sends them, what becomes of their images, and refusals."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.models.drawing import Source
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.edits import fitting_size_px
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.served import ModelNames
from tests.local_service import served
from tests.unit.serving.recorder import Recorder

CONFIG = ServingConfig(sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64), max_steps=50)
NAMES = ModelNames("merged", base=True, experts=("counting", "style"))
PATH = "/v1/images/edits"


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(values.astype(np.uint8))


def left_is_transparent(size: tuple[int, int] = (64, 48)) -> Image.Image:
    mask = Image.new("RGBA", size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


IMAGE = file_of(gradient())
MASK = file_of(left_is_transparent())


@pytest.fixture
def api(backend: Recorder) -> TestClient:
    app = build_app(backend, CONFIG, NAMES, ())
    return TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5), raise_server_exceptions=False)


@pytest.fixture
def client(backend: Recorder) -> Iterator[openai.OpenAI]:
    with (
        served(build_app(backend, CONFIG, NAMES, ())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def source_of(backend: Recorder) -> Source:
    source = backend.requests[-1].source
    assert source is not None
    return source


def edit(api: TestClient, image: Any = IMAGE, mask: Any = None, headers: Any = None, **fields: Any) -> Any:
    files = [("image", ("a.png", image)), *([("mask", ("m.png", mask))] if mask is not None else [])]
    return api.post(PATH, data={"prompt": "a cat"} | fields, files=files, headers=headers)


def test_the_parameters_of_openais_client_arrive(client: openai.OpenAI, backend: Recorder) -> None:
    answer = client.images.edit(
        image=IMAGE, mask=MASK, prompt="a cat", model="base", n=2, size="32x48", response_format="b64_json",
        quality="high", output_format="webp", output_compression=80, user="me", background="opaque",
        extra_body={"seed": 3, "guidance_scale": 4.5, "strength": 0.75, "negative_prompt": "[blurry"},
    )  # fmt: skip
    assert [datum.b64_json is not None for datum in answer.data or []] == [True, True]
    assert (answer.size, answer.output_format, answer.quality) == ("32x48", "webp", "high")
    first, second = backend.requests
    assert (first.seed, second.seed, first.steps, first.guidance_scale, first.mix) == (3, 4, 40, 4.5, ())
    assert (first.size_px, first.negative_prompt, source_of(backend).strength) == ((48, 32), "[blurry", 0.75)
    assert first.source is second.source, "an image is decoded once"
    assert answer.to_dict()["safety_identifier"] == "me"


def test_a_mix_arrives_as_an_object(client: openai.OpenAI, api: TestClient, backend: Recorder) -> None:
    mix = {"counting": 0.5, "style": 0.25}
    client.images.edit(image=IMAGE, prompt="a cat", extra_body={"model": mix, "steps": 5})
    assert edit(api, model='{"counting": 0.5, "style": 0.25}', num_inference_steps="5").status_code == 200
    assert [request.mix for request in backend.requests] == [tuple(mix.items())] * 2
    assert [request.steps for request in backend.requests] == [5, 5]


def test_of_several_images_the_first_is_changed(client: openai.OpenAI, backend: Recorder) -> None:
    answer = client.images.edit(image=[IMAGE, MASK], prompt="a cat")
    assert "the first of 2 is changed" in (answer.model_extra or {})["warnings"][0]
    assert np.array_equal(np.asarray(source_of(backend).image), np.asarray(gradient()))


def test_a_stream_has_the_events_of_edits(client: openai.OpenAI) -> None:
    events = list(client.images.edit(image=IMAGE, prompt="a cat", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    # The steps that are taken are counted, not those that are skipped.
    assert events[-1].model_dump()["usage"]["image_steps"] == 16


def test_transparent_pixels_of_the_mask_are_drawn_anew(api: TestClient, backend: Recorder) -> None:
    assert edit(api, mask=MASK).json()["warnings"] == []
    source = source_of(backend)
    assert source.strength == 1
    anew = np.asarray(source.mask)
    assert (anew[:, :32] == 255).all()
    assert (anew[:, 32:] == 0).all()
    edit(api, mask=MASK, size="96x80")
    resized = source_of(backend)
    assert resized.mask is not None
    assert resized.image.size == resized.mask.size == (96, 80)
    assert set(np.unique(np.asarray(resized.mask))) == {0, 255}


def test_an_image_is_seen_as_a_person_sees_it(api: TestClient, backend: Recorder) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert edit(api, file_of(gradient(), "JPEG", exif=exif, quality=100)).status_code == 200
    turned = source_of(backend).image
    assert turned.size == (48, 64)
    assert np.abs(np.asarray(turned, int) - np.asarray(gradient().transpose(Image.Transpose.ROTATE_270), int)).max() < 9
    answer = edit(api, MASK)
    assert "transparent pixels are seen upon white" in answer.json()["warnings"][0]
    assert source_of(backend).image.getpixel((0, 0)) == (255, 255, 255)
    assert source_of(backend).mask is None


def test_links_and_the_best_of_several(api: TestClient, backend: Recorder) -> None:
    answer = edit(api, response_format="url", best_of="3", seed="5").json()
    assert len(answer["candidates"]) == 3
    assert api.get(answer["data"][0]["url"]).status_code == 200
    assert [request.seed for request in backend.requests] == [5, 6, 7]


def test_a_form_that_is_sent_again_is_drawn_once(api: TestClient, backend: Recorder) -> None:
    again = {"Idempotency-Key": "order-1"}
    # Each call has a boundary of its own.
    answers = [edit(api, headers=again) for _ in range(2)]
    assert answers[0].request.headers["content-type"] != answers[1].request.headers["content-type"]
    assert answers[0].text == answers[1].text
    assert len(backend.requests) == 1
    assert edit(api, headers=again, prompt="a dog").json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"image": b"no image"}, 400, "image", "image must be a whole PNG, JPEG or WebP file"),
        ({"image": IMAGE[:200]}, 400, "image", "image must be a whole PNG"),
        ({"mask": b"no image"}, 400, "mask", "mask must be a whole PNG"),
        ({"mask": IMAGE}, 400, "mask", "mask must be an image with transparent pixels"),
        ({"mask": file_of(left_is_transparent((32, 48)))}, 400, "mask", "mask must have the size of the image, 64x48, got 32x48"),
        ({"image": file_of(gradient((5000, 4000)), "JPEG")}, 413, "image", "image must have at most 16777216 pixels"),
        ({"prompt": ""}, 400, "prompt", 'prompt must have at least 1 character, got ""'),
        ({"strength": "0"}, 400, "strength", 'strength must be greater than 0, got "0"'),
        ({"strength": "1.5"}, 400, "strength", "strength must be less than or equal to 1"),
        ({"strength": "much"}, 400, "strength", "strength must be a valid number"),
        ({"n": "many"}, 400, "n", "n must be a valid integer"),
        ({"size": "63x64"}, 400, "size", "size must have sides of 16 to 96 px, multiples of 8"),
        ({"model": "dall-e-2"}, 404, "model", "'dall-e-2' is not served"),
        ({"model": '{"counting": 9}'}, 400, "model", "weight of counting must be from -2 to 2"),
        ({"model": '{"counting"'}, 400, "model", "model must be JSON"),
        ({"unknown": "1"}, 400, "unknown", "unknown parameter: unknown"),
        ({"num_inference_steps": "51"}, 400, "num_inference_steps", "must be at most 50"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "prompt is given twice"),
        ({"mask": None, "best_of": "2", "stream": "true"}, 400, "best_of", "cannot be streamed"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_change(
    api: TestClient, backend: Recorder, changes: Any, status: int, param: str, message: str
) -> None:
    answer = edit(api, **changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert not backend.requests


@pytest.mark.parametrize(
    ("content", "content_type", "status", "message"),
    [
        (b'{"prompt": "a"}', "application/json", 415, "must be multipart/form-data"),
        (b"", "multipart/form-data; boundary=x", 400, "the body is empty"),
        (b"--y\r\n", "multipart/form-data; boundary=x", 400, "must be a multipart form"),
        (b"--x--\r\n", "multipart/form-data", 400, "must be a multipart form: Missing boundary"),
        (b'--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n', "multipart/form-data; boundary=x", 400, '"name" must be'),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n', "multipart/form-data; boundary=x", 400,
         "missing required parameter: image; send a file"),
        (b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\naGk=\r\n--x--\r\n', "multipart/form-data; boundary=x", 400,
         "image must be a file, not text"),
        (b'--x\r\nContent-Disposition: form-data; name="markup"; filename="a"\r\n\r\na\r\n--x--\r\n', "multipart/form-data; boundary=x",
         400, "unknown file: markup; files are image, mask"),
        (b"".join(b'--x\r\nContent-Disposition: form-data; name="k%d"\r\n\r\na\r\n' % each for each in range(100)) + b"--x--\r\n",
         "multipart/form-data; boundary=x", 400, "Too many fields"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_form_are_refused(
    api: TestClient, content: bytes, content_type: str, status: int, message: str
) -> None:
    answer = api.post(PATH, content=content, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 512, 1000]), st.sampled_from([64, 512]))
def test_an_image_of_any_size_has_one_that_can_be_drawn(width: int, height: int, default: int, other: int) -> None:
    sampling = SamplingConfig(steps=20, width_px=default, height_px=other)
    config = ServingConfig(sampling=sampling)
    fitted = fitting_size_px((width, height), config)
    assert all(side % 16 == 0 and 16 <= side <= config.longest_side_px for side in fitted)
    assert fitting_size_px(fitted, config) == fitted
    if 1 / 2 <= width / height <= 2 and default == other == 512:
        assert fitted[0] / fitted[1] == pytest.approx(width / height, rel=0.07)


def test_a_key_and_its_limit_stand_before_edits_too(backend: Recorder) -> None:
    key = ApiKey(hashlib.sha256(b"a-key-of-sufficient-length").digest(), 1)
    guarded = TestClient(build_app(backend, CONFIG, NAMES, (key,)))
    assert edit(guarded).status_code == 401
    headers = {"Authorization": "Bearer a-key-of-sufficient-length"}
    assert [edit(guarded, headers=headers).status_code for _ in range(2)] == [200, 429]


def test_the_form_is_in_the_description(api: TestClient) -> None:
    description = api.get("/openapi.json").json()
    body = description["paths"][PATH]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    schema = description["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert schema["properties"]["image"]["format"] == schema["properties"]["mask"]["format"] == "binary"
    assert set(schema["required"]) == {"image", "prompt"}
    assert "strength" in schema["properties"]
