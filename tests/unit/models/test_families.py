"""What every family keeps, a row each: it draws by the conditioning it is trained with, and says what it cannot draw."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from selma_ray.errors import ConfigError, DrawingError
from selma_ray.models.config import ModelConfig
from selma_ray.models.drawing import Drawing, Source
from selma_ray.models.family import Family, Predictor, open_family, open_predictor
from selma_ray.models.rendering import load_pipeline
from tests.unit.models.measuring import guidance_arguments, longest

DRAWING = Drawing("two apples", 3, 2, 2.0, 64, 32)


@pytest.fixture(scope="module")
def family(model: ModelConfig) -> Family:
    return open_family(model)


@pytest.fixture(scope="module")
def pipeline(model: ModelConfig) -> DiffusionPipeline:
    return load_pipeline(model, "cpu")


@pytest.fixture(scope="module")
def predictor(pipeline: DiffusionPipeline) -> Predictor:
    return open_predictor(pipeline)


@torch.inference_mode()
def test_it_draws_by_what_it_is_trained_with(family: Family, predictor: Predictor) -> None:
    encoders = family.load_encoders("cpu")
    trained_with = encoders.encode_prompts([DRAWING.prompt], *DRAWING.size_px)
    (conditions,) = predictor.encode([DRAWING])
    assert trained_with.keys() <= conditions.positive.keys()
    for name, tensor in trained_with.items():
        torch.testing.assert_close(conditions.positive[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    shapes = family.example_shapes(*DRAWING.size_px)
    assert {name: longest(name, tensor.shape[1:], shapes) for name, tensor in trained_with.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith("latent_")
    }
    assert predictor.start(DRAWING).latents_NCHW.shape[1:] == shapes["latent_mean"]
    assert (conditions.negative is not None) == (family.predictions_per_step == 2)


@torch.inference_mode()
def test_it_says_what_the_sides_of_an_image_divide_by(
    family: Family, pipeline: DiffusionPipeline, predictor: Predictor
) -> None:
    unit_px = family.unit_px
    assert predictor.start(replace(DRAWING, width_px=unit_px, height_px=3 * unit_px)).latents_NCHW.numel()
    latent_px = pipeline.vae_scale_factor
    if unit_px > latent_px:
        with pytest.raises(DrawingError, match=f"multiples of {unit_px}"):
            predictor.start(replace(DRAWING, width_px=unit_px + latent_px, height_px=unit_px))
    else:
        assert unit_px == latent_px


@torch.inference_mode()
@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 1.5])
def test_it_says_how_many_rows_of_a_step_an_image_takes(predictor: Predictor, guidance_scale: float) -> None:
    drawing = replace(DRAWING, guidance_scale=guidance_scale)
    (conditions,) = predictor.encode([drawing])
    assert predictor.rows_of(drawing) == (1 if conditions.negative is None else 2)


@torch.inference_mode()
def test_one_step_of_its_own_is_one_step_of_the_pipeline(pipeline: DiffusionPipeline, predictor: Predictor) -> None:
    (conditions,) = predictor.encode([DRAWING])
    course = predictor.start(DRAWING)
    while not course.finished:
        told = [each for each in (conditions.positive, conditions.negative) if each is not None]
        inputs_NChw = torch.cat([course.model_input()] * len(told))
        predicted, *unconditional = predictor.predict(inputs_NChw, course.timestep.repeat(len(told)), told).split(1)
        course.advance(predictor.guide(DRAWING, predicted, *(unconditional or [None])))
    images = pipeline(
        prompt=DRAWING.prompt, num_inference_steps=DRAWING.steps, **guidance_arguments(pipeline, DRAWING.guidance_scale),
        width=DRAWING.width_px, height=DRAWING.height_px, generator=torch.Generator().manual_seed(DRAWING.seed),
        output_type="np",
    ).images  # fmt: skip
    (image,) = predictor.decode(course.latents_NCHW)
    assert isinstance(image, Image.Image)
    assert image.size == (DRAWING.width_px, DRAWING.height_px)
    assert np.abs(np.asarray(image) / 255 - images[0]).max() < 0.006


@torch.inference_mode()
def test_a_dropped_caption_is_what_guidance_starts_from(family: Family, predictor: Predictor) -> None:
    encoders = family.load_encoders("cpu")
    dropped = encoders.encode_no_caption()
    (conditions,) = predictor.encode([DRAWING])
    starts_from: Any = conditions.negative or encoders.encode_prompts([""], *DRAWING.size_px)
    assert dropped
    for name, tensor in dropped.items():
        torch.testing.assert_close(tensor, starts_from[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.inference_mode()
def test_latents_that_were_drawn_are_examples_as_those_of_an_image_are(
    family: Family, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    image = Image.effect_noise((DRAWING.width_px, DRAWING.height_px), 90).convert("RGB")
    all_stays = Source(image, 1.0, Image.new("L", image.size, 0))
    course = predictor.start(replace(DRAWING, source=all_stays))
    while not course.finished:
        course.advance(torch.zeros_like(course.latents_NCHW))
    drawn = family.drawn_example(course.latents_NCHW)
    encoded = family.load_encoders("cpu").encode_images(np.asarray(image)[None])
    torch.testing.assert_close(drawn["latent_mean"], encoded["latent_mean"], rtol=1e-4, atol=1e-5)
    assert drawn["latent_std"].shape == encoded["latent_std"].shape
    assert not drawn["latent_std"].any()


def test_what_cannot_be_drawn_is_named_also_after_being_sent(tiny_pipeline_dir: Path) -> None:
    predictor = open_predictor(load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu"))
    with pytest.raises(DrawingError, match="5000 steps are not possible") as refusal:
        predictor.start(Drawing("a", 0, 5000, 2.0, 64, 48))
    sent = copy(refusal.value)  # by what Ray sends
    assert (str(sent), sent.field) == (str(refusal.value), "steps")


def test_another_pipeline_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"must be one of StableDiffusionPipeline, .*, got dict"):
        open_predictor({})
