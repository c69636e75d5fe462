from pathlib import Path
from typing import Any

import pytest

from selma_ray.adapters.config import LoraSettings
from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig, MixedConfig
from selma_ray.experts.job import ExpertJob, ExpertResult, finished_result, mean_of_tail
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder


@pytest.fixture
def job(tmp_path: Path) -> ExpertJob:
    return ExpertJob(
        "counting", RunFolder(str(tmp_path)), ("cache/k/counting",), ("k",), ModelConfig(), ExpertsConfig(), 0
    )


def with_settings(job: ExpertJob, **changes: Any) -> ExpertJob:
    config = job.config.model_copy(update=changes)
    return ExpertJob(job.name, job.folder, job.caches, job.cache_keys, job.model, config, job.seed)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-5},
        {"steps": 7},
        {"lora": LoraSettings(rank=4)},
        {"zero_stage": 1},
        {"min_snr_gamma": 5.0},
        {"caption_dropout": 0.1},
        {"selection": CheckpointChoiceConfig(every_steps=10)},
    ],
)
def test_the_key_changes_with_what_decides_the_weights(job: ExpertJob, change: Any) -> None:
    assert with_settings(job, **change).key != job.key


@pytest.mark.parametrize(
    "change",
    [
        {"cpus_per_worker": 8},
        {"max_concurrent": 1},
        {"checkpoint_every_steps": 3},
        {"max_failures": 9},
        {"mixed": MixedConfig(ranks=(4,))},
    ],
)
def test_the_key_does_not_change_with_placement(job: ExpertJob, change: Any) -> None:
    assert with_settings(job, **change).key == job.key


def test_where_adapters_are_scored_does_not_change_the_key(job: ExpertJob) -> None:
    chosen = with_settings(job, selection=CheckpointChoiceConfig(every_steps=10))
    elsewhere = with_settings(
        job, selection=CheckpointChoiceConfig(every_steps=10, max_concurrent=4, num_cpus=2, num_gpus=1)
    )
    assert chosen.key == elsewhere.key


def test_the_last_step_is_always_a_candidate(job: ExpertJob) -> None:
    assert job.candidate_steps == ()
    selection = CheckpointChoiceConfig(every_steps=4)
    assert with_settings(job, steps=10, selection=selection).candidate_steps == (4, 8, 10)
    assert with_settings(job, steps=8, selection=selection).candidate_steps == (4, 8)
    assert with_settings(job, steps=3, selection=selection).candidate_steps == (3,)


def test_an_expert_is_finished_when_its_adapter_and_its_own_result_are_there(job: ExpertJob) -> None:
    result = ExpertResult("counting", job.key, 0.5, 10, 40, "fp32", 1.0)
    assert finished_result(job) is None
    job.folder.write_json(result.as_dict(), job.directory, "result.json")
    assert finished_result(job) is None
    job.folder.write_json({}, job.directory, "adapter_config.json")
    assert finished_result(job) == result
    assert finished_result(with_settings(job, steps=7)) is None


def test_the_loss_of_a_result_is_the_mean_of_the_last_tenth() -> None:
    assert mean_of_tail([9.0] * 18 + [1.0, 3.0]) == 2.0
    assert mean_of_tail([5.0, 3.0]) == 3.0
