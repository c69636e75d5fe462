"""With fixed rows an image is the same to the byte whatever is drawn beside it, on the CPU in fp32."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.experts import open_experts
from selma_ray.serving.requests import ImageRequest
from tests.tiny_experts import save_experts
from tests.unit.serving.solo import random_request, run_mix

MIXES: tuple[Any, ...] = (None, (), (("counting", 1.0),), (("counting", 0.6), ("style", 0.4)), (("style", -0.5),))


@pytest.mark.parametrize("fixed_rows", [2, 4])
def test_images_are_the_same_to_the_byte_in_any_batch(tiny_pipeline_dir: Path, tmp_path: Path, fixed_rows: int) -> None:
    rng = random.Random(fixed_rows)
    model = ModelConfig(name=str(tiny_pipeline_dir))
    base: Any = load_pipeline(model, "cpu")
    experts = open_experts(save_experts(base, tmp_path), base.unet, type(base))
    merged = denoiser_for(load_pipeline(model, "cpu"), fixed_rows=fixed_rows)
    mixing = denoiser_for(base, experts, fixed_rows=fixed_rows)
    requests = [replace(random_request(rng), mix=mix) for mix in MIXES * 2]
    together = run_mix(StepBatch(merged, 5, (64, 64), mixing), requests, rng)
    for index, request in enumerate(requests):
        (alone,) = run_mix(StepBatch(merged, 5, (64, 64), mixing), [request], rng).values()
        assert np.array_equal(together[index], alone), request


def test_every_call_has_the_same_number_of_rows(tiny_pipeline_dir: Path) -> None:
    pipeline: Any = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    batch = StepBatch(denoiser_for(pipeline, fixed_rows=4), 5, (64, 64))
    requests = [ImageRequest("a red ball", seed, 2, guidance, 64, 64) for seed, guidance in enumerate((2.0, 1.0, 2.0))]
    run_mix(batch, requests, random.Random(0))
    assert set(rows) == {4}
    texts: list[int] = []
    pipeline.text_encoder.register_forward_pre_hook(
        lambda _, inputs, named: texts.append(len(torch.atleast_2d(inputs[0] if inputs else named["input_ids"]))),
        with_kwargs=True,
    )
    denoiser_for(pipeline).encode(requests)
    assert set(texts) == {1}
