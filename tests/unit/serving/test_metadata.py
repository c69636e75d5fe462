"""What an image's file says about how it was drawn, read as other tools read it."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from selma_ray.models.drawing import Source
from selma_ray.serving.encoding import PNG, FileFormat, OutputFormat, encode, reencode
from selma_ray.serving.metadata import metadata_of
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import picture

LOSSY: tuple[OutputFormat, ...] = ("webp", "jpeg")


def described(**changes: Any) -> dict[str, str]:
    request = replace(ImageRequest("a cat", 7, 20, 7.5, 64, 48), **changes)
    return metadata_of(request, ModelNames("merged"), "DDIMScheduler")


def texts_of(file: bytes) -> dict[str, str]:
    image = Image.open(io.BytesIO(file))
    image.load()
    return dict(image.text)  # type: ignore[attr-defined]


def comment_of(file: bytes) -> str:
    comment = Image.open(io.BytesIO(file)).getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def test_a_png_says_each_value_by_name() -> None:
    assert texts_of(encode(picture(1), PNG, described(negative_prompt="blurry"))) == {
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "model": "merged",
        "seed": "7",
        "steps": "20",
        "guidance_scale": "7.5",
        "size": "64x48",
        "scheduler": "DDIMScheduler",
        "parameters": "a cat\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: merged",
    }


def test_a_changed_image_says_how_far() -> None:
    metadata = described(source=Source(picture(1), 0.75))
    assert metadata["strength"] == "0.75"
    assert metadata["parameters"].endswith(", Model: merged, Denoising strength: 0.75")
    assert "strength" not in described()


def test_the_model_is_what_a_client_would_ask_for() -> None:
    mix = (("counting", 0.25), ("style", 1.0))
    models = [described(mix=mix)["model"] for mix in (None, (), (("style", 1.0),), (("style", 0.5),), mix)]
    assert models[:3] == ["merged", "base", "style"]
    assert [json.loads(model) for model in models[3:]] == [{"style": 0.5}, {"counting": 0.25, "style": 1.0}]
    # Quoted, so that a reader that splits at commas keeps it whole.
    assert described(mix=mix)["parameters"].endswith(f"Model: {json.dumps(models[4])}")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_is_read_back_from_every_format(prompt: str, negative_prompt: str) -> None:
    metadata = described(prompt=prompt, negative_prompt=negative_prompt)
    file = encode(picture(1), PNG, metadata)
    assert texts_of(file) == {name: text.replace("\0", "") for name, text in metadata.items()}
    for kind in LOSSY:
        assert comment_of(reencode(file, FileFormat(kind))) == metadata["parameters"].replace("\0", "")


def test_an_image_chosen_as_png_keeps_what_it_says() -> None:
    file = encode(picture(1), PNG, described())
    assert texts_of(reencode(file, PNG)) == described()


@pytest.mark.parametrize("kind", ["png", *LOSSY])
def test_without_metadata_a_file_says_nothing(kind: OutputFormat) -> None:
    image = Image.open(io.BytesIO(encode(picture(1), FileFormat(kind))))
    image.load()
    assert not getattr(image, "text", {})
    assert not image.getexif()
