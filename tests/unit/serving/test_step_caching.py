"""Step caching: nothing changes at interval 1, deep blocks rest above it, and images still depend on their request alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.step_caching import DeepFeatures, RowMemory
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.requests import ImageRequest
from tests.unit.serving.solo import stepped


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path) -> Any:
    return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")


def drawn(batch: StepBatch, requests: list[ImageRequest], rng: random.Random | None = None) -> list[np.ndarray]:
    """Draw requests that come at random moments where `rng` is given, else all at once."""
    pending, tickets = list(requests), []
    images: dict[int, Any] = {}
    while pending or len(batch):
        while pending and (rng is None or not len(batch) or rng.random() < 0.4):
            tickets.append(batch.submit(pending.pop(0)))
        images |= {outcome.ticket: np.asarray(outcome.image, dtype=int) for outcome in stepped(batch)}
    return [images[ticket] for ticket in tickets]


def requests() -> list[ImageRequest]:
    rng = random.Random(0)
    return [
        ImageRequest("a red ball", seed, rng.randint(2, 9), rng.choice([1.0, 3.0]), 64, rng.choice([64, 32]))
        for seed in range(8)
    ]


def test_images_depend_on_their_request_alone(pipeline: Any) -> None:
    denoiser = denoiser_for(pipeline, cache_interval=3)
    together = drawn(StepBatch(denoiser, 4, (64, 64)), requests(), random.Random(1))
    alone = [drawn(StepBatch(denoiser, 1, (64, 64)), [request])[0] for request in requests()]
    assert max(np.abs(one - other).max() for one, other in zip(together, alone, strict=True)) <= 1


def test_deep_blocks_rest_between_whole_steps(pipeline: Any) -> None:
    calls = {"first": 0, "deep": 0}
    for name, module in (
        ("first", pipeline.unet.down_blocks[0].resnets[0]), ("deep", pipeline.unet.mid_block.resnets[0])
    ):  # fmt: skip
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    drawn(StepBatch(denoiser_for(pipeline, cache_interval=3), 1, (64, 64)), requests()[:1])
    steps = requests()[0].steps
    assert calls == {"first": steps, "deep": (steps + 2) // 3}


def test_fresh_features_give_what_the_whole_unet_gives(pipeline: Any) -> None:
    unet, rows = pipeline.unet, torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))

    def predict(indices: Any) -> torch.Tensor:
        return unet(rows[indices], torch.tensor(500), encoder_hidden_states=text[indices]).sample

    with torch.inference_mode():
        whole = predict([0, 1, 2])
        features = DeepFeatures(unet, 2)
        memories = [RowMemory() for _ in range(3)]
        assert torch.allclose(features.predict(predict, memories), whole)
        # One row is due for a whole step; the others replay features that are those of this very step.
        memories[1].age = 0
        assert torch.allclose(features.predict(predict, memories), whole, atol=1e-5)
    assert [memory.age for memory in memories] == [0, 1, 0]


def test_a_unet_without_deep_blocks_is_refused(pipeline: Any) -> None:
    pipeline.unet.up_blocks = pipeline.unet.up_blocks[:1]
    with pytest.raises(ConfigError, match="cache_interval must be 1"):
        denoiser_for(pipeline, cache_interval=2)
