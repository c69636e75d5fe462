"""Experts mixed per request in one batch draw what diffusers' set_adapters draws one at a time."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from selma_ray.adapters.mixes import Mix
from selma_ray.adapters.mixing import LowRank
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.experts import open_experts
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ServedModels
from tests.tiny_experts import RANKS, save_experts
from tests.tiny_models import save_tiny_sdxl
from tests.unit.serving.solo import in_double, stepped

MIXES: tuple[Mix | None, ...] = (
    None, (), (("counting", 1.0),), (("style", 1.0),), (("counting", 0.6), ("style", 0.4)),
    (("common", 1.5), ("counting", -0.5), ("style", 0.25)),
)  # fmt: skip


def request_of(rng: random.Random, mix: Mix | None) -> ImageRequest:
    return ImageRequest(
        rng.choice(["a red ball", "two blue cups"]), rng.randrange(1000), rng.randint(1, 4), rng.choice([1.0, 3.0]),
        64, 64, mix=mix,
    )  # fmt: skip


def drawn_together(batch: StepBatch, requests: list[ImageRequest]) -> list[np.ndarray]:
    tickets = [batch.submit(request) for request in requests]
    images = {}
    while len(batch):
        for outcome in stepped(batch):
            assert outcome.error is None
            images[outcome.ticket] = np.asarray(outcome.image, dtype=int)
    return [images[ticket] for ticket in tickets]


def drawn_by_set_adapters(pipeline: Any, request: ImageRequest) -> np.ndarray:
    if request.mix:
        pipeline.enable_lora()
        pipeline.set_adapters([name for name, _ in request.mix], [weight for _, weight in request.mix])
    elif RANKS.keys() <= set(getattr(pipeline.unet, "peft_config", {})):
        pipeline.disable_lora()
    image = pipeline(
        prompt=request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance_scale,
        width=64, height=64, generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]  # fmt: skip
    return np.asarray(image, dtype=int)


def with_adapters(pipeline: Any, folders: dict[str, str]) -> Any:
    for name, folder in folders.items():
        config = LoraConfig.from_pretrained(folder)
        assert config.r == RANKS[name]
        # diffusers reads PEFT's keys under the name of the part.
        state = {f"unet.{key}": value for key, value in peft_weights(folder).items()}
        pipeline.load_lora_weights(state, adapter_name=name)
    return pipeline


def peft_weights(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(f"{folder}/adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in weights.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_mixes_in_one_batch_equal_set_adapters_one_at_a_time(
    tiny_pipeline_dir: Path, tmp_path: Path, family: str
) -> None:
    folder = tiny_pipeline_dir
    if family == "sdxl":
        folder = tmp_path / "sdxl"
        save_tiny_sdxl(folder)
    model = ModelConfig(name=str(folder))
    folders = save_experts(load_pipeline(model, "cpu"), tmp_path / "experts")
    base: Any = in_double(load_pipeline(model, "cpu"))
    mixing = denoiser_for(base, open_experts(folders, base.unet, type(base)))
    batch = StepBatch(denoiser_for(in_double(load_pipeline(model, "cpu"))), 5, (64, 64), mixing)
    rng = random.Random(0)
    requests = [request_of(rng, mix) for mix in MIXES * 2]
    rng.shuffle(requests)
    reference = in_double(with_adapters(load_pipeline(model, "cpu"), folders))
    expected = [drawn_by_set_adapters(reference, request) for request in requests]
    for image, wanted, request in zip(drawn_together(batch, requests), expected, requests, strict=True):
        np.testing.assert_array_equal(image, wanted, err_msg=str(request))
    # The experts change the picture: equality is not that of images without them.
    plain = [drawn_by_set_adapters(reference, ImageRequest("a red ball", 1, 4, 3.0, 64, 64, mix=mix)) for mix in MIXES]
    assert min(np.abs(plain[0] - image).max() for image in plain[2:]) > 5


def test_all_mixes_share_one_step(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    pipeline: StableDiffusionPipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    experts = open_experts(save_experts(pipeline, tmp_path), pipeline.unet, type(pipeline))
    batch = StepBatch(denoiser_for(pipeline), 8, (64, 64), denoiser_for(pipeline, experts))
    for mix in MIXES[1:]:
        batch.submit(ImageRequest("a red ball", 0, 1, 2.0, 64, 64, mix=mix))
    assert len(batch.step()) == len(MIXES) - 1


def test_an_expert_of_another_model_is_refused(tiny_pipeline_dir: Path) -> None:
    pipeline = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    for module, rows in (("no.such.module", 32), ("conv_in", 32), ("mid_block.attentions.0.proj_in", 7)):
        expert = {module: LowRank(torch.zeros(2, 32), torch.zeros(rows, 2))}
        with pytest.raises(
            AdapterError,
            match=rf"expert odd: {module} must be a linear module or a convolution of shape \({rows}, 32\)",
        ):
            denoiser_for(pipeline, {"odd": expert})


def test_names_that_would_be_ambiguous_are_refused() -> None:
    model = ModelConfig()
    for name in ("base", "merged"):
        with pytest.raises(ConfigError, match=f"must not be named '{name}'"):
            ServedModels("merged", model, model, {name: "folder"})
    with pytest.raises(ConfigError, match="name base"):
        ServedModels("merged", model, None, {"counting": "folder"})
