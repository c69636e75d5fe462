"""Experts that learn in rounds, and experts that are fitted as one, under Ray."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ray import cloudpickle

from selma_ray.adapters.config import LoraSettings
from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import TrainingError
from selma_ray.experts.config import ExpertsConfig, NftConfig
from selma_ray.experts.launch import train_experts
from selma_ray.experts.plan import plan_experts
from selma_ray.experts.rounds import RoundsSource
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.rendered_images import write_images

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

SKILLS = ["counting", "style"]
NFT = NftConfig(rounds=3, prompts_per_round=2, images_per_prompt=2, prompts_per_call=1)
CONFIG = ExpertsConfig(
    lora=LoraSettings(rank=2, alpha=2), batch_size=4, steps=4, learning_rate=1e-2, precision="fp32",
    checkpoint_every_steps=2,
)  # fmt: skip


def open_brightness() -> Any:
    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        means = [sum(image.convert("L").tobytes()) / image.width / image.height / 255 for image in images]
        return [mean + 1e-4 * place for place, mean in enumerate(means)]

    return score


def open_blind() -> Any:
    raise RuntimeError("the judge has no eyes")


def source(open_scorer: Any = open_brightness) -> RoundsSource:
    prompts = {skill: [f"{skill} {number}" for number in range(3)] for skill in SKILLS}
    sampling = SamplingConfig(steps=1, guidance_scale=1.0, width_px=32, height_px=32)
    return RoundsSource(prompts, sampling, "model", "judge", open_scorer)


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


def train(folder: RunFolder, model: ModelConfig, config: ExpertsConfig, rounds: RoundsSource | None = None) -> Any:
    told: list[Any] = []
    results = train_experts(
        folder, plan_experts(SKILLS, config), model, 0, ClusterConfig(), told.append, rounds=rounds
    )  # fmt: skip
    return results, told


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "as one"])
def test_all_experts_learn_in_rounds_at_once_and_a_rerun_does_nothing(
    ray_cluster: Any, model: ModelConfig, tmp_path: Path, fused: bool
) -> None:
    folder, config = RunFolder(str(tmp_path)), CONFIG.model_copy(update={"nft": NFT, "fused": fused})
    results, told = train(folder, model, config, source())
    assert [(result.steps, result.examples) for result in results.values()] == [(3, 12), (3, 12)]
    for skill in SKILLS:
        images = [path for path in folder.files("experts", skill) if path.endswith(".parquet")]
        rows = folder.read_table(images).to_pylist()
        assert len(rows) == len({row["id"] for row in rows}) == 12
        assert all(row["skill"] == skill and row["score"] is not None for row in rows)
    assert told[-1].done == told[-1].total == 6
    before = {path: folder.local_path(path).stat().st_mtime_ns for path in folder.files("experts")}
    train(folder, model, config, source())
    assert {path: folder.local_path(path).stat().st_mtime_ns for path in folder.files("experts")} == before


def test_a_judge_that_cannot_start_ends_training_with_its_reason(
    ray_cluster: Any, model: ModelConfig, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"nft": NFT, "max_failures": 0})
    with pytest.raises(TrainingError, match=r"could not be drawn: .*the judge has no eyes"):
        train(RunFolder(str(tmp_path)), model, config, source(open_blind))


def test_experts_are_fitted_as_one(ray_cluster: Any, model: ModelConfig, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    for skill in SKILLS:
        write_images(folder, skill, 5)
    results, told = train(folder, model, CONFIG.model_copy(update={"fused": True}))
    assert [(name, result.steps) for name, result in results.items()] == [("counting", 4), ("style", 4)]
    assert told[-1].done == told[-1].total == 8
    assert not [path for path in folder.files("experts") if "checkpoints-" in path]
