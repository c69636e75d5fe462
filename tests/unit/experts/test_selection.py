from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig
from selma_ray.experts.job import ExpertJob, ExpertResult, finished_result
from selma_ray.experts.selection import CandidateScores, choose_adapter, is_fitted, stopped_at
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder

SELECTION = CheckpointChoiceConfig(every_steps=2)


@pytest.fixture
def job(tmp_path: Path) -> ExpertJob:
    config = ExpertsConfig(steps=6, selection=SELECTION)
    return ExpertJob("counting", RunFolder(str(tmp_path)), (), (), ModelConfig(), config, 0, ("counting",))


def leave_candidates(job: ExpertJob, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        job.folder.write_bytes(b"weights %d" % step, job.candidate(step), "adapter_model.safetensors")
        job.folder.write_bytes(b"{}", job.candidate(step), "adapter_config.json")
        job.folder.write_json({"step": step, "dsg": score, "images": 4}, f"{job.candidate(step)}.json")


def leave_result(job: ExpertJob) -> None:
    result = ExpertResult("counting", job.key, 0.5, 6, 40, "fp32", 1.0)
    job.folder.write_json(result.as_dict(), job.directory, "result.json")


@pytest.mark.parametrize(
    ("scores", "best"), [({2: 0.5, 4: 0.75, 6: 0.6}, 4), ({2: 0.5, 4: 0.7, 6: 0.7}, 4), ({2: 0.1, 4: 0.2, 6: 0.3}, 6)]
)
def test_the_best_score_is_kept_and_of_equal_ones_the_earliest(job: ExpertJob, scores: Any, best: int) -> None:
    leave_candidates(job, scores)
    leave_result(job)
    choose_adapter(job)
    result = finished_result(job)
    assert result is not None
    assert (result.step, result.dev_dsg) == (best, scores[best])
    assert job.folder.read_bytes(job.directory, "adapter_model.safetensors") == b"weights %d" % best
    kept = job.folder.read_json(job.directory, "dev_scores.json")
    assert {row["step"]: row["dsg"] for row in kept} == scores
    assert not job.folder.exists(job.candidates)


def test_training_is_over_when_every_adapter_and_the_result_are_there(job: ExpertJob) -> None:
    leave_candidates(job, {2: 0.5, 4: 0.6})
    leave_result(job)
    assert not is_fitted(job)
    leave_candidates(job, {6: 0.7})
    assert is_fitted(job)
    assert finished_result(job) is None


def test_training_stops_where_patience_runs_out_and_what_comes_later_does_not_count(job: ExpertJob) -> None:
    early = replace(job, config=job.config.model_copy(update={"early_stop": 1}))
    leave_candidates(early, {2: 0.5})
    assert stopped_at(early) is None
    leave_candidates(early, {4: 0.5, 6: 0.9})  # trained, and scored, before anyone looked
    assert stopped_at(early) == 4
    assert stopped_at(job) is None
    curve = [{"step": step, "loss": float(step)} for step in range(1, 7)]
    early.folder.write_json(curve, early.directory, "curve.json")
    leave_result(early)
    choose_adapter(early)
    result = finished_result(early)
    assert result is not None
    assert (result.step, result.steps, result.loss, result.dev_dsg) == (2, 4, 4.0, 0.5)
    assert early.folder.read_json(early.directory, "curve.json") == curve[:4]
    assert [row["step"] for row in early.folder.read_json(early.directory, "dev_scores.json")] == [2, 4]


def test_an_expert_that_stopped_early_is_fitted_without_later_candidates(job: ExpertJob) -> None:
    early = replace(job, config=job.config.model_copy(update={"early_stop": 1}))
    leave_candidates(early, {2: 0.5, 4: 0.4})
    assert not is_fitted(early)
    result = ExpertResult("counting", early.key, 0.5, 4, 40, "fp32", 1.0)
    early.folder.write_json(result.as_dict(), early.directory, "result.json")
    assert is_fitted(early)
    early.folder.delete(early.candidate(4))
    assert not is_fitted(early)


def test_patience_counts_scores_in_a_row(job: ExpertJob) -> None:
    config = ExpertsConfig(steps=12, selection=SELECTION, early_stop=2)
    patient = replace(job, config=config)
    leave_candidates(patient, {2: 0.5, 4: 0.4, 6: 0.6, 8: 0.6, 10: 0.5, 12: 0.9})
    assert stopped_at(patient) == 10


def test_nothing_waits_where_no_adapter_was_left_or_all_are_scored(job: ExpertJob) -> None:
    def score(adapter_dir: Any, skills: Any, show: Any = None) -> None:
        pytest.fail("must not be called")

    assert CandidateScores([job], SELECTION, score, ClusterConfig()).is_idle
    leave_candidates(job, {2: 0.5, 4: 0.6, 6: 0.7})
    scores = CandidateScores([job], SELECTION, score, ClusterConfig())
    scores.poll()
    assert scores.is_idle
    job.folder.delete(f"{job.candidate(4)}.json")
    assert not CandidateScores([job], SELECTION, score, ClusterConfig()).is_idle


class FakeRay:
    """Runs a task when it is waited for; a started task's name is its reference."""

    def __init__(self) -> None:
        self.started: dict[str, tuple] = {}

    def remote(self, function: Any) -> Any:
        return self

    def options(self, **resources: Any) -> SimpleNamespace:
        self.resources = resources
        return SimpleNamespace(remote=self._start)

    def _start(self, score: Any, job: Any, step: Any, num_gpus: Any) -> str:
        assert num_gpus == self.resources["num_gpus"]
        self.started[f"{job.name} {step}"] = (score, job, step)
        return f"{job.name} {step}"

    def wait(self, references: Any, num_returns: Any, timeout: Any) -> Any:
        assert timeout == 0
        return references[:num_returns], []

    def get(self, reference: Any) -> Any:
        score, job, step = self.started[reference]
        return score(job.candidate(step), job.skills)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeRay()
    for name in ("remote", "wait", "get"):
        monkeypatch.setattr(f"ray.{name}", getattr(fake, name))
    return fake


def test_adapters_are_scored_a_few_at_a_time_as_training_leaves_them(job: ExpertJob, fake_ray: Any) -> None:
    scores = CandidateScores(
        [job], SELECTION, lambda directory, skills, show=None: {"dsg": 0.5, "images": 3}, ClusterConfig()
    )
    scores.poll()
    assert fake_ray.started == {}
    leave_candidates(job, {2: 0.0, 4: 0.0})
    for step in (2, 4):
        job.folder.delete(f"{job.candidate(step)}.json")
    scores.poll()
    assert list(fake_ray.started) == ["counting 2"]
    assert scores.detail() == "scoring counting 2"
    assert fake_ray.resources == {"num_cpus": 1, "num_gpus": 0}
    scores.poll()
    assert list(fake_ray.started) == ["counting 2", "counting 4"]
    scores.poll()
    assert scores.is_idle
    assert job.folder.read_json(f"{job.candidate(4)}.json") == {"step": 4, "dsg": 0.5, "images": 3}


def test_a_score_that_fails_is_told_and_the_other_adapters_of_that_expert_are_left_alone(
    job: ExpertJob, fake_ray: Any
) -> None:
    def broken(directory: Any, skills: Any, show: Any = None) -> None:
        raise RuntimeError("no judge")

    leave_candidates(job, {2: 0.0, 4: 0.0})
    for step in (2, 4):
        job.folder.delete(f"{job.candidate(step)}.json")
    scores = CandidateScores([job], SELECTION, broken, ClusterConfig())  # type: ignore[arg-type]
    scores.poll()
    scores.poll()
    assert str(scores.failures["counting"]) == "no judge"
    assert scores.is_idle
    assert list(fake_ray.started) == ["counting 2"]


def test_a_choice_without_a_scorer_is_our_own_fault(job: ExpertJob) -> None:
    with pytest.raises(ValueError, match="needs a scorer"):
        CandidateScores([job], SELECTION, None, ClusterConfig())
