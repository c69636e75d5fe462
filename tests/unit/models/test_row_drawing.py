"""Rows that are drawn to be learnt from: the pipeline's images, with the latents that they were decoded from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import open_predictor
from selma_ray.models.rendering import Renderer, load_pipeline
from selma_ray.models.row_drawing import DrawnRow, RowDrawer

PROMPTS = ["two apples", "two apples", "a dog on the left of three cats"]
SEEDS = [3, 4, 5]


def sampling(guidance_scale: float = 2.0) -> SamplingConfig:
    return SamplingConfig(steps=2, guidance_scale=guidance_scale, width_px=64, height_px=32)


def drawn(drawer: RowDrawer, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS) -> list[DrawnRow]:
    rows = drawer.draw(prompts, seeds)
    assert all(isinstance(row, DrawnRow) for row in rows), rows
    return [row for row in rows if isinstance(row, DrawnRow)]


def difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).max())


def test_rows_are_the_pipeline_s_images_and_their_latents(model: ModelConfig) -> None:
    pipeline = load_pipeline(model, "cpu")
    rows = drawn(RowDrawer(pipeline, sampling()))
    images = Renderer(pipeline, sampling()).render(PROMPTS, SEEDS)
    assert [difference(row.image, image) <= 1 for row, image in zip(rows, images, strict=True)] == [True] * 3
    with torch.inference_mode():
        decoded = open_predictor(pipeline).decode(torch.cat([row.latents for row in rows]))
    assert [difference(row.image, image) for row, image in zip(rows, decoded, strict=True)] == [0] * 3  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pipeline_dir(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_same_batch_gives_the_same_rows(pipeline_dir: ModelConfig, guidance_scale: float) -> None:
    drawer = RowDrawer(load_pipeline(pipeline_dir, "cpu"), sampling(guidance_scale))
    first, again = drawn(drawer), drawn(drawer)
    assert all(torch.equal(row.latents, other.latents) for row, other in zip(first, again, strict=True))
    assert not torch.equal(first[0].latents, first[1].latents)
    renderer = Renderer(load_pipeline(pipeline_dir, "cpu"), sampling(guidance_scale))
    images = renderer.render(PROMPTS, SEEDS)
    assert max(difference(row.image, image) for row, image in zip(first, images, strict=True)) <= 1
    assert drawer.scheduler == renderer.scheduler


def test_what_cannot_be_drawn_is_its_error_and_spares_the_others(pipeline_dir: ModelConfig) -> None:
    drawer = RowDrawer(load_pipeline(pipeline_dir, "cpu"), sampling())
    first, broken, last = drawer.draw(PROMPTS, [3, 2**70, 5])
    assert isinstance(first, DrawnRow)
    assert isinstance(broken, Exception)
    assert isinstance(last, DrawnRow)


def test_large_images_are_drawn_few_at_a_time_on_a_cpu(
    pipeline_dir: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = load_pipeline(pipeline_dir, "cpu")
    calls: list[int] = []
    forward = pipeline.unet.forward

    def counted(rows: torch.Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(len(rows))
        return forward(rows, *rest, **named)

    monkeypatch.setattr(pipeline.unet, "forward", counted)
    large = SamplingConfig(steps=1, guidance_scale=1.0, width_px=256, height_px=256)
    RowDrawer(pipeline, large).draw(["a"] * 5, list(range(5)))
    assert calls == [4, 1]
    RowDrawer(pipeline, SamplingConfig(steps=1, guidance_scale=1.0, width_px=32, height_px=32)).draw(
        ["a"] * 5, list(range(5))
    )
    assert calls[2:] == [5]
