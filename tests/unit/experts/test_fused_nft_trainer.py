"""Experts that learn in rounds as one against the same experts alone; the renderer draws in this process where Ray's would."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selma_ray.adapters.config import LoraSettings
from selma_ray.errors import TrainingError
from selma_ray.experts.config import ExpertsConfig, NftConfig
from selma_ray.experts.drawing import DrawRounds
from selma_ray.experts.fused_nft_trainer import FusedNftTrainer
from selma_ray.experts.fused_trainer import FusedTrainer, fused_trainer_of
from selma_ray.experts.job import ExpertJob, finished_result
from selma_ray.experts.nft_trainer import NftTrainer
from selma_ray.experts.plan import plan_experts
from selma_ray.experts.rounds import DrawnData, Round
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import adapter, assert_same_bits
from tests.unit.experts.test_fused_trainer import assert_same_experts
from tests.unit.experts.test_nft_trainer import brightness

pytestmark = pytest.mark.usefixtures("process_group")

PROMPTS = {"counting": ("one apple", "two apples", "three apples"), "style": ("a car in ink", "a cup in oil")}
NFT = NftConfig(rounds=3, prompts_per_round=2, images_per_prompt=3, prompts_per_call=1, old_share_per_round=0.3)


class DrawnExperts:
    """Experts of a run of their own, whose rounds are drawn in this process, and a count of what was."""

    def __init__(self, folder: RunFolder, model: ModelConfig, score: Any = brightness) -> None:
        config = ExpertsConfig(
            lora=LoraSettings(rank=2, alpha=2), batch_size=3, learning_rate=1e-3, precision="fp32", gradient_clip=0.05,
            nft=NFT, fused=True,
        )  # fmt: skip
        sampling = SamplingConfig(steps=1, guidance_scale=1.0, width_px=32, height_px=32)
        self.jobs = [
            ExpertJob(
                each.name, folder, (), (), model, each.config, 0, each.skills,
                drawn=DrawnData(tuple((each.name, prompt) for prompt in PROMPTS[each.name]), sampling, "model", "judge"),
            )
            for each in plan_experts(list(PROMPTS), config)
        ]  # fmt: skip
        self.plans = [plan for job in self.jobs if (plan := job.rounds)]
        self.images = 0
        self._draw = DrawRounds(self.plans, model, lambda: score, config.precision)

    def draw(self, round_: Round) -> None:
        for chunk in round_.missing_chunks():
            self.images += self._draw(self.plans.index(round_.plan), round_.number, chunk)

    def fit(self, stop_at: int | None = None, start_from: str | None = None, save_to: str | None = None) -> None:
        trainer: Any = fused_trainer_of(self.jobs)
        for rounds in trainer.rounds:
            rounds.wait_for_images = self.draw
        if start_from:
            trainer.load(start_from)
        while trainer.steps_done < (stop_at or self.jobs[0].config.steps):
            trainer.step()
        trainer.save(save_to) if save_to else trainer.export(1.0)

    def fit_alone(self) -> None:
        for job in self.jobs:
            trainer: Any = NftTrainer(job)
            trainer.rounds.wait_for_images = self.draw
            while trainer.steps_done < job.config.steps:
                trainer.step()
            trainer.export(1.0)
            trainer.close()


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def fused(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> DrawnExperts:
    experts = DrawnExperts(RunFolder(str(tmp_path_factory.mktemp("fused"))), model)
    experts.fit()
    return experts


def test_jobs_of_rounds_are_fitted_in_rounds(fused: DrawnExperts) -> None:
    assert isinstance(fused_trainer_of(fused.jobs), FusedNftTrainer)
    assert issubclass(FusedNftTrainer, FusedTrainer)


def test_experts_of_rounds_fitted_as_one_are_those_fitted_apart(
    fused: DrawnExperts, model: ModelConfig, tmp_path: Path
) -> None:
    alone = DrawnExperts(RunFolder(str(tmp_path)), model)
    alone.fit_alone()
    assert fused.images == alone.images == 2 * 3 * 2 * 3
    for job, other, plan in zip(fused.jobs, alone.jobs, fused.plans, strict=True):
        assert_same_experts(job, other)
        result = finished_result(job)
        assert result is not None
        assert (result.steps, result.examples) == (6, 18)
        rows = job.folder.read_json(job.directory, "curve.json")
        assert {"loss", "score", "equal_groups"} <= rows[0].keys()
        assert not job.folder.files(plan.of(3).directory, "examples")
    first, second = (next(t for name, t in adapter(job).items() if "lora_B" in name) for job in fused.jobs)
    assert not torch.equal(first, second)


def test_the_adapter_that_draws_is_the_old_one(fused: DrawnExperts) -> None:
    for plan in fused.plans:
        drawn_by = [
            load_file(plan.folder.local_path(plan.of(number).adapter, "adapter_model.safetensors")) for number in (1, 2)
        ]
        moved = [sum(float(t.abs().sum()) for n, t in each.items() if "lora_B" in n) for each in drawn_by]
        assert moved[0] == 0
        assert moved[1] > 0


def test_resumed_experts_draw_nothing_twice_and_have_the_same_bits(
    fused: DrawnExperts, model: ModelConfig, tmp_path: Path
) -> None:
    killed = DrawnExperts(RunFolder(str(tmp_path / "run")), model)
    for name in ("checkpoint", "lost"):
        (tmp_path / name).mkdir()
    killed.fit(stop_at=3, save_to=str(tmp_path / "checkpoint"))  # in the middle of the second round
    killed.fit(start_from=str(tmp_path / "checkpoint"), stop_at=5, save_to=str(tmp_path / "lost"))
    killed.fit(start_from=str(tmp_path / "checkpoint"))
    assert killed.images == fused.images
    for job, other in zip(killed.jobs, fused.jobs, strict=True):
        assert_same_bits(adapter(job), adapter(other))


def test_an_expert_whose_images_do_not_come_ends_all_with_its_name(model: ModelConfig, tmp_path: Path) -> None:
    experts = DrawnExperts(RunFolder(str(tmp_path)), model)
    experts.plans[0].stop("the judge is ill")
    trainer = fused_trainer_of(experts.jobs)
    with pytest.raises(TrainingError, match="images of expert counting could not be drawn: the judge is ill"):
        trainer.step()
