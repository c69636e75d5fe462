from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.curves import CurveLog, log_scores
from selma_ray.experts.job import ExpertJob
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder


@pytest.fixture
def job(tmp_path: Path) -> ExpertJob:
    return ExpertJob("counting", RunFolder(str(tmp_path / "run")), (), (), ModelConfig(), ExpertsConfig(steps=3), 0)


def events(job: ExpertJob) -> EventAccumulator:
    found = EventAccumulator(job.folder.path(job.directory, "tensorboard"))
    found.Reload()
    return found


def test_training_dev_scores_and_samples_are_in_one_folder(job: ExpertJob) -> None:
    curves = CurveLog(job, steps_done=0)
    for step, loss in enumerate((3.0, 2.0, 1.0), start=1):
        curves.add(step, {"loss": loss, "loss_noise_0_25": loss / 2})
    curves.close()
    log_scores(job, {"dsg": 0.5}, {"two cats": Image.new("RGB", (8, 8))}, 2)
    found = events(job)
    assert [event.value for event in found.Scalars("train/loss_noise_0_25")] == [1.5, 1.0, 0.5]
    assert [(event.step, event.value) for event in found.Scalars("dev/dsg")] == [(2, 0.5)]
    assert found.Tags()["images"] == ["samples/two cats"]


def test_an_expert_that_starts_anew_has_a_curve_of_its_own(job: ExpertJob) -> None:
    for steps_done, step in ((0, 1), (1, 2), (0, 1)):
        curves = CurveLog(job, steps_done)
        curves.add(step, {"loss": float(step)})
        curves.close()
    assert [event.step for event in events(job).Scalars("train/loss")] == [1]


def test_trackers_do_not_decide_the_adapter(job: ExpertJob) -> None:
    other = ExpertJob(job.name, job.folder, (), (), job.model, ExpertsConfig(steps=3, trackers=("wandb",)), 0)
    assert other.key == job.key
