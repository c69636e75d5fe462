"""The generator as a plain object, without Ray: images, streams, and a change of its merged weights."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, FileFormat
from selma_ray.serving.experts import open_experts
from selma_ray.serving.generator import Generator
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ServedModels
from tests.tiny_experts import save_experts
from tests.tiny_models import save_tiny_stable_diffusion

CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64),
    max_batch_size=4,
    num_threads=1,
    request_timeout_s=3600,  # on a busy machine hundreds of steps take minutes, and what would be late is refused
)


@pytest.fixture(scope="module")
def experts(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(
        load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu"), tmp_path_factory.mktemp("experts")
    )


@pytest.fixture(scope="module")
def generator(tiny_pipeline_dir: Path, experts: dict[str, str]) -> Iterator[Generator]:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    generator = Generator(ServedModels("merged", model, model, experts), CONFIG, open_experts)
    yield generator
    generator.close()


def request(**changes: Any) -> ImageRequest:
    return ImageRequest(**{
        "prompt": "a red ball", "seed": 0, "steps": 2, "guidance_scale": 2.0, "width_px": 64, "height_px": 64, **changes
    })  # fmt: skip


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def image(generator: Generator, **changes: Any) -> np.ndarray:
    (content,) = asyncio.run(generator.generate([request(**changes)], PNG)).files
    return pixels(content)


def test_the_base_beside_the_merged_model_is_itself(generator: Generator) -> None:
    assert np.array_equal(image(generator), image(generator, mix=()))
    assert not np.array_equal(image(generator), image(generator, mix=(("counting", 1.0),)))


def test_a_file_says_what_drew_it_unless_that_is_off(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> dict[str, str]:
        (file,) = asyncio.run(generator.generate([request(seed=5, mix=(("counting", 1.0),))], PNG)).files
        image = Image.open(io.BytesIO(file))
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]

    assert (texts()["seed"], texts()["model"], texts()["scheduler"]) == ("5", "counting", "DDIMScheduler")
    monkeypatch.setattr(generator, "_config", CONFIG.model_copy(update={"image_metadata": False}))
    assert texts() == {}


def test_a_stream_yields_previews_and_then_images(generator: Generator) -> None:
    async def collect() -> list:
        requests = [request(steps=6, num_previews=2), request(steps=2, seed=1)]
        return [drawn async for drawn in generator.stream(requests, FileFormat("webp"))]

    drawn = asyncio.run(collect())
    *previews, last = [each.preview for each in drawn if each.index == 0]
    assert last is None
    assert previews in ([0, 1], [0], [1], []), "of previews that are late none is shown"
    assert [(each.index, each.preview) for each in drawn if each.index == 1] == [(1, None)]
    assert np.abs(pixels(drawn[-1].image) - image(generator, steps=6)).mean() < 20  # WebP loses what is noise


def test_a_stream_that_is_left_frees_its_slots(generator: Generator) -> None:
    async def leave() -> None:
        stream = generator.stream([request(steps=900, num_previews=500) for _ in range(4)], PNG)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await generator.generate([request()], PNG)

    asyncio.run(leave())
    assert generator.stats()["in_flight"] == 0


def test_an_image_can_be_drawn_as_fast_as_the_next(generator: Generator) -> None:
    # What is measured at the start is there before the first request, so that it can be refused where it would come too late.
    assert generator.stats()["row_step_s"] > 0


def test_merged_weights_are_changed_in_place(generator: Generator, experts: dict[str, str], tmp_path: Path) -> None:
    before = image(generator)
    asyncio.run(generator.reconfigure({"adapter": experts["counting"]}))
    assert np.abs(image(generator) - image(generator, mix=(("counting", 1.0),))).max() <= 1
    save_tiny_stable_diffusion(tmp_path / "other", seed=1)
    asyncio.run(generator.reconfigure({"pipeline": str(tmp_path / "other")}))
    assert np.abs(image(generator) - before).max() > 10
    assert np.array_equal(image(generator, mix=()), before)
    asyncio.run(generator.reconfigure({}))
    assert np.array_equal(image(generator), before)
    assert generator.stats()["swap_s"] > 0


@pytest.mark.parametrize(
    ("user_config", "error"),
    [
        ({"pipeline": "/nowhere"}, ModelNotFoundError),
        ({"adaptor": "x"}, ConfigError),
        ({"adapter": "/nowhere"}, Exception),
    ],
)
def test_weights_that_cannot_be_used_leave_the_old_ones(generator: Generator, user_config: Any, error: Any) -> None:
    before = image(generator)
    with pytest.raises(error):
        asyncio.run(generator.reconfigure(user_config))
    assert np.array_equal(image(generator), before)
