"""Choice of each expert's checkpoint: its adapters are scored on the dev prompts of its skills beside training, the best is kept.

Layout, until the choice: experts/<name>/candidates-<key>/step-000100/ holds an adapter, step-000100.json beside it its score.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from PIL import Image

from selma_ray.adapters.files import ADAPTER_FILES, is_adapter
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.experts.config import CheckpointChoiceConfig
from selma_ray.experts.job import ExpertJob, ExpertResult, finished_result, mean_of_tail
from selma_ray.models.device import see_own_gpus, task_options

__all__ = ["AdapterScorer", "CandidateScores", "choose_adapter", "is_fitted", "stopped_at"]

logger = logging.getLogger(__name__)

_SCORES_FILE = "dev_scores.json"


class AdapterScorer(Protocol):
    """Renders and judges: handed in by whoever puts the stages together, so that this stage needs no judge. Must pickle."""

    def __call__(
        self, adapter_dir: str, skills: Sequence[str], show: Callable[[Mapping[str, Image.Image]], None] | None = None
    ) -> Mapping[str, float]:
        """Return `dsg` in [0, 1], and whatever else is worth keeping, of an adapter on the dev prompts of `skills`.

        `show` is given a few of the images by their prompts, the same ones for every adapter.
        """


class CandidateScores:
    """Scores the adapters that experts leave while they train, a few at a time, and keeps what it finds.

    A task waits until training leaves it its CPUs, so it is never in training's way.
    """

    def __init__(
        self,
        jobs: Sequence[ExpertJob],
        selection: CheckpointChoiceConfig | None,
        score: AdapterScorer | None,
        cluster: ClusterConfig,
    ) -> None:
        if selection and score is None:
            raise ValueError("experts.selection needs a scorer")
        self.failures: dict[str, Exception] = {}
        self._selection = selection
        self._score = score
        self._cluster = cluster
        self._unscored = [
            (job, step)
            for job in jobs
            for step in job.candidate_steps
            if not job.folder.exists(f"{job.candidate(step)}.json")
        ]
        self._running: dict[Any, tuple[ExpertJob, int]] = {}

    def poll(self) -> None:
        """Keep the scores that are finished and start those that training has left adapters for; never waits."""
        if self._selection is None:
            return
        self._collect()
        for job, step in self._ready()[: self._selection.max_concurrent - len(self._running)]:
            self._unscored.remove((job, step))
            self._running[self._start(job, step)] = (job, step)

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing is being scored and no adapter waits for it."""
        return not self._running and not self._ready()

    def detail(self) -> str:
        """Return in words what is being scored."""
        return " · ".join(f"scoring {job.name} {step}" for job, step in self._running.values())

    def _ready(self) -> list[tuple[ExpertJob, int]]:
        return [
            (job, step)
            for job, step in self._unscored
            if job.name not in self.failures and is_adapter(job.folder, job.candidate(step)) and not stopped_at(job)
        ]

    def _start(self, job: ExpertJob, step: int) -> Any:
        import ray

        assert self._selection is not None
        num_gpus = self._selection.num_gpus
        task = ray.remote(_score_candidate).options(
            num_cpus=self._selection.num_cpus, **task_options(num_gpus), **role_options("render", self._cluster)
        )
        return task.remote(self._score, job, step, num_gpus)

    def _collect(self) -> None:
        import ray

        finished, _ = (
            ray.wait(list(self._running), num_returns=len(self._running), timeout=0) if self._running else ([], [])
        )
        for reference in finished:
            job, step = self._running.pop(reference)
            try:
                scores = ray.get(reference)
            except Exception as error:
                logger.warning("adapter of %s at step %d could not be scored", job.name, step, exc_info=error)
                self.failures.setdefault(job.name, error)
            else:
                job.folder.write_json({"step": step, **scores}, f"{job.candidate(step)}.json")


def is_fitted(job: ExpertJob) -> bool:
    """Tell whether training is over: the adapter is there, or every adapter to choose from."""
    if finished_result(job) is not None:
        return True
    folder = job.folder
    if not (job.candidate_steps and folder.exists(job.directory, "result.json")):
        return False
    result = ExpertResult(**folder.read_json(job.directory, "result.json"))
    trained = [step for step in job.candidate_steps if step <= result.steps]
    return result.key == job.key and all(is_adapter(folder, job.candidate(step)) for step in trained)


def stopped_at(job: ExpertJob) -> int | None:
    """Return the step at which experts.early_stop ends training, by the scores that are there; None where none says so yet.

    Depends on the scores alone, not on when they came: what was trained beyond that step is not looked at.
    """
    best, waited = float("-inf"), 0
    for step in job.candidate_steps if job.config.early_stop else ():
        if not job.folder.exists(f"{job.candidate(step)}.json"):
            return None
        score = job.folder.read_json(f"{job.candidate(step)}.json")["dsg"]
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == job.config.early_stop:
            return step
    return None


def choose_adapter(job: ExpertJob) -> None:
    """Make the adapter with the best dev score the expert's, the earliest of equal ones; every candidate must be scored.

    Of an expert whose training was stopped early, the candidates, the curve and the result are those up to that step.
    """
    folder = job.folder
    result = _result_until(job, stopped_at(job))
    steps = [step for step in job.candidate_steps if step <= result.steps]
    scores = [folder.read_json(f"{job.candidate(step)}.json") for step in steps]
    best = max(scores, key=lambda score: (score["dsg"], -score["step"]))
    folder.write_json(scores, job.directory, _SCORES_FILE)
    folder.write_json(replace(result, step=best["step"], dev_dsg=best["dsg"]).as_dict(), job.directory, "result.json")
    for name in ADAPTER_FILES:
        folder.write_bytes(folder.read_bytes(job.candidate(best["step"]), name), job.directory, name)
    folder.delete(job.candidates)


def _result_until(job: ExpertJob, stopped: int | None) -> ExpertResult:
    result = ExpertResult(**job.folder.read_json(job.directory, "result.json"))
    if stopped is None:
        return result
    curve = job.folder.read_json(job.directory, "curve.json")[:stopped]
    job.folder.write_json(curve, job.directory, "curve.json")
    return replace(result, steps=stopped, loss=mean_of_tail([row["loss"] for row in curve]))


def _score_candidate(score: AdapterScorer, job: ExpertJob, step: int, num_gpus: float) -> dict[str, float]:
    """Score one adapter, and show the score in the trackers beside the loss; runs as a Ray task."""
    see_own_gpus(num_gpus)
    from selma_ray.experts.curves import log_scores

    samples: dict[str, Image.Image] = {}
    scores = dict(score(job.folder.path(job.candidate(step)), job.skills, samples.update))
    log_scores(job, {"dsg": scores["dsg"]}, samples, step)
    return scores
