from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob, ExpertResult
from selma_ray.experts.lanes import Lane, divide, with_threads_of_renderers
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder


def jobs_named(names: str, path: str = "unused") -> list[ExpertJob]:
    folder = RunFolder(path)
    return [ExpertJob(name, folder, (), (), ModelConfig(), ExpertsConfig(), 0) for name in names]


def note_fitted(job: ExpertJob, key: str | None = None) -> None:
    result = ExpertResult(job.name, key or job.key, 0.5, 10, 40, "fp32", 1.0)
    job.folder.write_json(result.as_dict(), job.directory, "result.json")
    job.folder.write_json({}, job.directory, "adapter_config.json")


@given(st.integers(0, 12), st.integers(1, 20))
def test_every_expert_is_in_one_lane_and_no_lane_is_empty_or_long(experts: int, slots: int) -> None:
    jobs = jobs_named("abcdefghijkl"[:experts])
    lanes = divide(jobs, slots)
    assert sorted(job.name for lane in lanes for job in lane.jobs) == [job.name for job in jobs]
    lengths = [len(lane.jobs) for lane in lanes]
    assert len(lengths) == min(experts, slots)
    assert not lengths or 1 <= min(lengths) <= max(lengths) <= min(lengths) + 1


def test_checkpoints_belong_to_the_experts_of_a_lane_in_their_order() -> None:
    a, b, c = jobs_named("abc")
    assert Lane((a, b)).checkpoints == Lane(tuple(jobs_named("ab"))).checkpoints
    assert len({Lane(jobs).checkpoints for jobs in ((a,), (a, b), (b, a), (a, c))}) == 4
    assert Lane((b, a)).directory == "experts/b"


def test_what_is_fitted_is_skipped(tmp_path: Path) -> None:
    a, b, c = jobs_named("abc", str(tmp_path))
    lane = Lane((a, b, c))
    assert lane.unfitted() == (a, b, c)
    for job in (a, b):
        note_fitted(job, key=a.key)
    assert lane.unfitted() == (b, c), "the adapter of b is another recipe's"


TAKING_TURNS = {"nft": {"renderers": 2, "cpus_per_renderer": 0.5}, "cpus_per_worker": 1}


def jobs_with(settings: dict[str, Any], names: str, path: Path) -> tuple[ExpertJob, ...]:
    config = ExpertsConfig.model_validate(settings)
    return tuple(replace(job, config=config) for job in jobs_named(names, str(path)))


@pytest.mark.parametrize(
    ("settings", "num_cores", "threads"),
    [
        (TAKING_TURNS, 8, 2),
        (TAKING_TURNS | {"nft": {"renderers": 4, "cpus_per_renderer": 2}}, 64, 9),
        (TAKING_TURNS | {"nft": {"renderers": 4, "cpus_per_renderer": 2}}, 4, 4),
        (TAKING_TURNS | {"workers_per_expert": 2}, 8, 1),
        ({"cpus_per_worker": 3}, 8, 3),
    ],
)
def test_the_only_lane_at_work_has_the_threads_of_its_renderers_up_to_the_cores(
    settings: dict[str, Any], num_cores: int, threads: int, tmp_path: Path
) -> None:
    (lane,) = with_threads_of_renderers([Lane(jobs_with(settings, "ab", tmp_path))], num_cores)
    assert lane.num_threads == threads


def test_lanes_that_work_at_once_keep_to_their_cpus(tmp_path: Path) -> None:
    a, b, c = jobs_with(TAKING_TURNS, "abc", tmp_path)
    lanes = [Lane((a, b)), Lane((c,))]
    assert [lane.num_threads for lane in with_threads_of_renderers(lanes, 8)] == [1, 1]
    note_fitted(c)
    assert [lane.num_threads for lane in with_threads_of_renderers(lanes, 8)] == [2, 1]
    note_fitted(a)
    note_fitted(b)
    assert with_threads_of_renderers(lanes, 8) == lanes
    assert with_threads_of_renderers([], 8) == [], "most runs have no mixture of experts, the second wave"
