from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob, ExpertResult
from selma_ray.experts.lanes import Lane, divide
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder


def jobs_named(names: str, path: str = "unused") -> list[ExpertJob]:
    folder = RunFolder(path)
    return [ExpertJob(name, folder, (), (), ModelConfig(), ExpertsConfig(), 0) for name in names]


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
        job.folder.write_json(
            ExpertResult(job.name, a.key, 0.5, 10, 40, "fp32", 1.0).as_dict(), job.directory, "result.json"
        )
        job.folder.write_json({}, job.directory, "adapter_config.json")
    assert lane.unfitted() == (b, c), "the adapter of b is another recipe's"
