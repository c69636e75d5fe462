"""Experts that are fitted as one against the same experts fitted one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig
from selma_ray.experts.fused_trainer import FusedTrainer
from selma_ray.experts.job import ExpertJob, finished_result
from selma_ray.experts.lanes import lanes_of
from selma_ray.experts.selection import is_fitted
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, adapter, assert_same_bits, encoded_job, fit

pytestmark = pytest.mark.usefixtures("process_group")

NAMES = ("counting", "style", "common")
CLIPPED = BASE.model_copy(update={"gradient_clip": 0.05})
"""Clips every step: experts clipped as one would differ from experts that are clipped apart."""


@pytest.fixture(scope="module")
def make_jobs(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(**changes: Any) -> list[ExpertJob]:
        folder = RunFolder(str(tmp_path_factory.mktemp("run")))
        model = ModelConfig(name=str(tiny_pipeline_dir))
        return [encoded_job(folder, model, name, CLIPPED.model_copy(update=changes)) for name in NAMES]

    return make


def fit_as_one(
    jobs: list[ExpertJob], stop_at: int | None = None, start_from: str | None = None, save_to: str = ""
) -> None:
    trainer = FusedTrainer(jobs)
    if start_from:
        trainer.load(start_from)
    while trainer.steps_done < (stop_at or jobs[0].config.steps):
        trainer.step()
        if trainer.steps_done in jobs[0].candidate_steps:
            trainer.export_candidates()
    if save_to:
        trainer.save(save_to)
    else:
        trainer.export(1.0)


def in_order(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name in sorted(weights)}


def assert_same_experts(fused: ExpertJob, alone: ExpertJob) -> None:
    """Deltas are compared: the scale of an adapter may stand in its settings or in B."""
    first, second = in_order(adapter(fused)), in_order(adapter(alone))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 2, "caption_dropout": 0.4, "min_snr_gamma": 5.0},
        {"lora": BASE.lora.model_copy(update={"targets": ("to_q", "ff.net.2", "time_emb_proj", "conv1")})},
    ],
    ids=["plain", "accumulated", "convolutions"],
)
def test_experts_fitted_as_one_are_those_fitted_apart(make_jobs: Any, changes: Any) -> None:
    fused, alone = make_jobs(**changes), make_jobs(**changes)
    fit_as_one(fused)
    for job, other in zip(fused, alone, strict=True):
        fit(other)
        assert_same_experts(job, other)
        losses = [[row["loss"] for row in each.folder.read_json(each.directory, "curve.json")] for each in (job, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not torch.equal(*(next(t for n, t in adapter(job).items() if "lora_B" in n) for job in fused[:2]))


def test_a_resumed_lane_gives_the_bits_of_one_that_was_not_stopped(make_jobs: Any, tmp_path: Path) -> None:
    jobs, again = make_jobs(), make_jobs()
    fit_as_one(jobs)
    fit_as_one(again, stop_at=4, save_to=str(tmp_path))
    fit_as_one(again, start_from=str(tmp_path))
    for job, other in zip(jobs, again, strict=True):
        assert_same_bits(adapter(job), adapter(other))
        result = finished_result(other)
        assert result is not None
        assert (result.steps, result.examples) == (6, 7)


def test_candidates_of_every_expert_are_left_to_choose_from(make_jobs: Any) -> None:
    jobs = make_jobs(steps=4, selection=CheckpointChoiceConfig(every_steps=2))
    fit_as_one(jobs)
    for job in jobs:
        assert is_fitted(job)
        early, late = (
            load_file(job.folder.local_path(job.candidate(step), "adapter_model.safetensors")) for step in (2, 4)
        )
        assert any(not torch.equal(early[name], late[name]) for name in early)


def test_a_wave_is_one_lane_of_what_is_alike_and_lanes_of_the_rest(make_jobs: Any) -> None:
    jobs = make_jobs(fused=True)
    mixed = encoded_job(jobs[0].folder, jobs[0].model, "mixed-r8", jobs[0].config.model_copy(update={"steps": 9}))
    lanes = lanes_of([*jobs, mixed], slots=2)
    assert [(len(lane.jobs), lane.fused) for lane in lanes] == [(3, True), (1, False)]
    assert [lane.fused for lane in lanes_of(make_jobs(), slots=2)] == [False, False]
    assert lanes[0].checkpoints != lanes_of(make_jobs(), slots=1)[0].checkpoints


@pytest.mark.parametrize("settings", [{"fused": True, "dpo": {}}, {"fused": True, "ema": 0.9}])
def test_what_learns_from_pairs_or_is_averaged_cannot_be_fused(settings: Any) -> None:
    with pytest.raises(ValueError, match="fused must be false with"):
        ExpertsConfig.model_validate(settings)
