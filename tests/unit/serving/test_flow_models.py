"""Models of flow matching in the step-batching engine draw what diffusers' own pipelines draw, whatever else is in the batch."""

import asyncio
import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.encoding import PNG
from selma_ray.serving.errors import RequestError
from selma_ray.serving.experts import open_experts
from selma_ray.serving.generator import Generator
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ServedModels
from tests.tiny_experts import RANKS, save_experts
from tests.unit.adapters.test_mixing import MIXES, peft_weights
from tests.unit.models.tiny_families import FLOW_FAMILIES
from tests.unit.serving.solo import (
    FULL_SIZE_PX,
    assert_equal_to_solo,
    in_double,
    random_request,
    run_mix,
    solo_image,
    stepped,
)


@pytest.fixture(scope="module", params=list(FLOW_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("flow") / family
    FLOW_FAMILIES[family](folder, tiny_pipeline_dir)
    return ModelConfig(name=str(folder))


@pytest.fixture(scope="module")
def experts(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))


def request_for(family: str, rng: random.Random) -> ImageRequest:
    request = random_request(rng)
    if family == "qwen_image":
        request = replace(request, steps=max(2, request.steps))
    return replace(request, negative_prompt="") if family == "flux" else request


def plain(**changes: Any) -> ImageRequest:
    return replace(ImageRequest("a red ball", 0, 3, 2.0, 64, 64), **changes)


@pytest.mark.parametrize("seed", range(2))
def test_random_mixes_equal_the_pipeline_itself(family: str, model: ModelConfig, seed: int) -> None:
    rng = random.Random(seed)
    pipeline = load_pipeline(model, "cpu")
    requests = [request_for(family, rng) for _ in range(5)]
    assert_equal_to_solo(pipeline, requests, rng)
    assert (
        np.abs(solo_image(pipeline, plain(guidance_scale=1.0)) - solo_image(pipeline, plain(guidance_scale=9.0))).max()
        > 1
    )


@pytest.mark.heavy
def test_many_random_mixes_equal_the_pipeline_itself(family: str, model: ModelConfig) -> None:
    pipeline = load_pipeline(model, "cpu")
    for seed in range(100, 150):
        rng = random.Random(seed)
        assert_equal_to_solo(pipeline, [request_for(family, rng) for _ in range(6)], rng)


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
@pytest.mark.parametrize("scheduler", ["dynamic", "heun", "unipc"])
def test_schedulers_keep_their_own_state(family: str, model: ModelConfig, scheduler: str) -> None:
    pipeline = load_pipeline(model, "cpu")
    pipeline.scheduler = {
        "dynamic": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }[scheduler]
    rng = random.Random(0)
    # Heun's scheduler in diffusers cannot take a single step.
    requests = [replace(request_for(family, rng), steps=rng.randint(2, 5)) for _ in range(3)]
    assert_equal_to_solo(pipeline, requests, rng)


def test_mixes_of_experts_in_one_batch_equal_set_adapters_one_at_a_time(
    family: str, model: ModelConfig, experts: dict[str, str]
) -> None:
    reference = load_pipeline(model, "cpu")
    for name, folder in experts.items():
        state = {f"transformer.{key}": value for key, value in peft_weights(folder).items()}
        reference.load_lora_weights(state, adapter_name=name)
    in_double(reference)
    base: Any = in_double(load_pipeline(model, "cpu"))
    batch = StepBatch(
        denoiser_for(in_double(load_pipeline(model, "cpu"))),
        4,
        FULL_SIZE_PX,
        denoiser_for(base, open_experts(experts, base.transformer, type(base))),
    )
    requests = [plain(seed=seed, mix=mix) for seed, mix in enumerate(MIXES)]
    images = run_mix(batch, requests, random.Random(0))
    pictures = []
    for index, request in enumerate(requests):
        if request.mix:
            reference.enable_lora()
            reference.set_adapters([name for name, _ in request.mix], [weight for _, weight in request.mix])
        else:
            reference.disable_lora()
        np.testing.assert_array_equal(images[index], solo_image(reference, request), err_msg=str(request))
        pictures.append(solo_image(reference, plain()))
    assert set(reference.transformer.peft_config) == set(RANKS)
    # The experts change the picture: equality is not that of images without them.
    assert min(np.abs(pictures[0] - picture).max() for picture in pictures[2:]) > 5


REFUSED = {
    "sd3": (({"width_px": 60}, "size"), ({"height_px": 136}, "size")),
    "flux": (({"width_px": 60}, "size"), ({"negative_prompt": "blurry"}, "negative_prompt")),
    "z_image": (({"width_px": 60}, "size"),),
    "flux2": (({"width_px": 60}, "size"),),
    "qwen_image": (({"width_px": 60}, "size"), ({"steps": 1}, "num_inference_steps")),
    "sana": (({"width_px": 62}, "size"),),
}


def test_what_a_family_cannot_draw_is_the_callers_error_and_spares_the_others(family: str, model: ModelConfig) -> None:
    denoiser = denoiser_for(load_pipeline(model, "cpu"))
    for changes, param in REFUSED[family]:
        batch = StepBatch(denoiser, 4, FULL_SIZE_PX)
        good = batch.submit(plain(steps=2))
        bad = batch.submit(plain(**changes))  # type: ignore[arg-type]
        outcomes = {outcome.ticket: outcome for _ in range(3) for outcome in stepped(batch)}
        error = outcomes[bad].error
        assert isinstance(error, RequestError)
        assert (error.status, error.param) == (400, param)
        assert outcomes[good].image is not None


def test_step_caching_is_refused_by_name(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"cache_interval must be 1 for \w+Pipeline, got 2"):
        denoiser_for(load_pipeline(model, "cpu"), cache_interval=2)


def test_the_generator_previews_mixes_and_changes_its_weights(model: ModelConfig, experts: dict[str, str]) -> None:
    config = ServingConfig(
        sampling=SamplingConfig(steps=3, guidance_scale=2.0, width_px=64, height_px=64), max_batch_size=4, num_threads=1
    )
    generator = Generator(ServedModels("merged", model, model, experts), config, open_experts)

    async def drawn(request: ImageRequest) -> list[np.ndarray]:
        stream = generator.stream([request], PNG)
        return [np.asarray(Image.open(io.BytesIO(each.image)), dtype=int) async for each in stream]

    try:
        *previews, image = asyncio.run(drawn(plain(steps=6, num_previews=2)))
        # Each preview shows where the velocity leads, which comes closer to the finished image with every step.
        distances = [np.abs(preview - image).mean() for preview in previews]
        assert distances == sorted(distances, reverse=True)
        mixed = asyncio.run(drawn(plain(mix=(("counting", 1.0),))))[-1]
        asyncio.run(generator.reconfigure({"adapter": experts["counting"]}))
        assert np.abs(asyncio.run(drawn(plain()))[-1] - mixed).max() <= 1
    finally:
        generator.close()
