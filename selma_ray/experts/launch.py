"""All experts at once: their caches, then one Ray Train run for each lane of them, as many lanes as the cluster holds."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.placement import Demand, available_resources, check_fit, is_local, role_options
from selma_ray.errors import TrainingError
from selma_ray.experts.cache import SkillCache, encode_caches, skill_cache
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob, ExpertResult, finished_result
from selma_ray.experts.lanes import Lane, lanes_of, with_threads_of_renderers
from selma_ray.experts.plan import PlannedExpert, plan_experts
from selma_ray.experts.rounds import RoundsSource
from selma_ray.experts.selection import AdapterScorer, CandidateScores, choose_adapter
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import see_own_gpus, uses_cuda
from selma_ray.progress import Progress, Report
from selma_ray.storage import RunFolder

__all__ = ["ExpertResult", "plan_experts", "train_experts"]

logger = logging.getLogger(__name__)

_POLL_S = 0.5


def train_experts(
    folder: RunFolder,
    planned: Sequence[PlannedExpert],
    model: ModelConfig,
    seed: int,
    cluster: ClusterConfig,
    report: Report | None = None,
    score: AdapterScorer | None = None,
    rounds: RoundsSource | None = None,
) -> dict[str, ExpertResult]:
    """Fit the planned LoRAs (SELMA, section 3.3) and return their results by name; finished ones are kept.

    `score` chooses among the adapters of a LoRA whose settings have a `selection`. One LoRA's failure does not stop the others;
    raises TrainingError that names those that failed. A mixture of experts is fitted when they are finished. With experts.nft the images
    are drawn while experts are fitted, from what `rounds` has.
    """
    if planned[0].config.nft is not None:
        return _train_in_rounds(folder, planned, model, seed, cluster, report, rounds)
    in_pairs = planned[0].config.dpo is not None
    skills = dict.fromkeys(skill for expert in planned for skill in expert.skills)
    caches = {skill: skill_cache(folder, skill, model, in_pairs=in_pairs) for skill in skills}
    jobs: list[ExpertJob] = []
    for expert in planned:
        mixed = tuple(job for job in jobs if job.name in expert.experts)
        jobs.append(_job(expert, [caches[skill] for skill in expert.skills], mixed, folder, model, seed))
    if any(finished_result(job) is None for job in jobs):
        config = planned[0].config  # placement and caches are alike for all
        slots = _slots(config, cluster)
        encode_caches(folder, _needed_caches(jobs, caches.values()), model, config, cluster)
        # Finished ones keep their places, so that lanes stay the same and a rerun finds their checkpoints.
        for wave in ([job for job in jobs if not job.experts], [job for job in jobs if job.experts]):
            scores = CandidateScores(wave, config.selection, score, cluster)
            reporter = _Reporter(jobs, report, scores)
            _raise_for(_fit_wave(wave, slots, cluster, reporter, scores))
    return {job.name: _result_of(job) for job in jobs}


def _train_in_rounds(
    folder: RunFolder,
    planned: Sequence[PlannedExpert],
    model: ModelConfig,
    seed: int,
    cluster: ClusterConfig,
    report: Report | None,
    source: RoundsSource | None,
) -> dict[str, ExpertResult]:
    """Fit experts in rounds: the renderers and the trainers start once, and work side by side until the last round."""
    assert source is not None
    jobs = [
        ExpertJob(each.name, folder, (), (), model, each.config, seed, each.skills, drawn=source.data(each.skills))
        for each in planned
    ]
    unfinished = [job for job in jobs if finished_result(job) is None]
    if unfinished:
        from selma_ray.experts.draw_stream import RoundsDrawing

        config, nft = jobs[0].config, jobs[0].config.nft
        assert nft is not None
        slots = _slots(config, cluster, {"CPU": nft.cpus_per_renderer, "GPU": nft.gpus_per_renderer}, nft.renderers)
        scores = CandidateScores(jobs, None, None, cluster)
        plans = [plan for job in unfinished if (plan := job.rounds)]
        with RoundsDrawing(plans, nft, model, source.open_scorer, config.precision, cluster):
            _raise_for(_fit_wave(jobs, slots, cluster, _Reporter(jobs, report, scores), scores))
    return {job.name: _result_of(job) for job in jobs}


def _job(
    expert: PlannedExpert,
    caches: Sequence[SkillCache],
    mixed: tuple[ExpertJob, ...],
    folder: RunFolder,
    model: ModelConfig,
    seed: int,
) -> ExpertJob:
    directories, keys = tuple(cache.directory for cache in caches), tuple(cache.key for cache in caches)
    return ExpertJob(expert.name, folder, directories, keys, model, expert.config, seed, expert.skills, mixed)


def _needed_caches(jobs: Sequence[ExpertJob], caches: Iterable[SkillCache]) -> list[SkillCache]:
    keys = {key for job in jobs if finished_result(job) is None for key in job.cache_keys}
    return [cache for cache in caches if cache.key in keys]


def _slots(
    config: ExpertsConfig, cluster: ClusterConfig, renderer: Mapping[str, float] | None = None, renderers: int = 0
) -> int:
    """Return how many experts train at once, beside `renderers` that take what a `renderer` takes.

    A local cluster has what it has. One that was joined may grow on demand, so there all experts ask at once and Ray queues.
    """
    if config.max_concurrent:
        return config.max_concurrent
    if not is_local(cluster):
        return sys.maxsize
    demand = {name: amount * config.workers_per_expert for name, amount in _worker_resources(config).items()}
    check_fit([Demand("experts.workers_per_expert x experts.cpus_per_worker", "train", demand)], cluster)
    resources, taken = available_resources("train", cluster), renderer or {}
    # Shares of CPUs are no binary fractions: five times 0.2 must fit one.
    left = {name: resources[name] - renderers * taken.get(name, 0) + 1e-6 for name in demand}
    return max(1, int(min(left[name] / amount for name, amount in demand.items())))


def _worker_resources(config: ExpertsConfig) -> dict[str, float]:
    return {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})


def _fit_wave(
    wave: Sequence[ExpertJob], slots: int, cluster: ClusterConfig, reporter: "_Reporter", scores: CandidateScores
) -> dict[str, Exception]:
    """Fit experts, `slots` at a time, and choose their adapters; returns the failures by name."""
    unfinished = [job for job in wave if finished_result(job) is None]
    lanes = lanes_of(wave, slots)
    failures: dict[str, Exception] = {}
    if is_local(cluster):
        lanes = with_threads_of_renderers(lanes, num_cores=len(os.sched_getaffinity(0)))
        # No machine is taken away with notice here, and the watcher is a process more per lane.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Daemons, so that an interrupt ends the driver, and with it Ray's controllers, without waiting for training.
    threads = [
        threading.Thread(target=_fit_lane, args=(lane, cluster, failures), name=f"fit-{lane.jobs[0].name}", daemon=True)
        for lane in lanes
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not scores.is_idle:
        scores.poll()
        reporter.report()
        time.sleep(_POLL_S)
    failures |= scores.failures
    for job in unfinished:
        if job.candidate_steps and job.name not in failures:
            choose_adapter(job)
    reporter.report()
    for job in unfinished:
        job.folder.delete(job.directory, "progress.json")
    return failures


def _fit_lane(lane: Lane, cluster: ClusterConfig, failures: dict[str, Exception]) -> None:
    """Fit the experts of a lane; where one fails, those after it get a run of their own, and its checkpoints stay.

    Experts that are fitted as one fail as one.
    """
    while lane.unfitted():
        try:
            _run(lane, cluster)
            break
        except Exception as error:
            unfitted = lane.unfitted()
            if not unfitted:  # the run failed when its work was done
                break
            if lane.fused:
                logger.warning("experts fitted as one failed", exc_info=error)
                failures |= {job.name: error for job in unfitted}
                return
            failed, *others = unfitted
            logger.warning("expert %s failed", failed.name, exc_info=error)
            failures[failed.name] = error
        if not others:
            return
        lane = replace(lane, jobs=tuple(others))
    lane.jobs[0].folder.delete(lane.directory, lane.checkpoints)


def _run(lane: Lane, cluster: ClusterConfig) -> None:
    """Run one Ray Train run; it goes on from its own last checkpoint, if it has one."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = lane.jobs[0].config  # placement is alike for all
    filesystem, place = lane.jobs[0].folder.place(lane.directory)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"lane": lane},
        torch_config=TorchConfig(backend="nccl" if uses_cuda(config.gpus_per_worker) else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers_per_expert,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_worker_resources(config),
            **role_options("train", cluster),
        ),
        run_config=RunConfig(
            name=lane.checkpoints,
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    trainer.fit()


def _run_worker(settings: dict[str, Any]) -> None:
    """Import the training loop in the worker alone: neither the driver nor Ray Train's controller loads DeepSpeed."""
    lane: Lane = settings["lane"]
    num_gpus = lane.jobs[0].config.gpus_per_worker
    see_own_gpus(num_gpus)
    if not uses_cuda(num_gpus):
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed decorates an optimiser that is not used here with torch.compile, which would load the compiler for seconds.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from selma_ray.experts.loop import fit_experts

    fit_experts(lane)


def _result_of(job: ExpertJob) -> ExpertResult:
    result = finished_result(job)
    if result is None:
        raise TrainingError(
            f"expert {job.name} left no adapter in {job.folder.path(job.directory)}; run the same command again"
        )
    return result


def _raise_for(failures: Mapping[str, Exception]) -> None:
    if failures:
        reasons = "; ".join(f"{name}: {reason_of(error)}" for name, error in failures.items())
        raise TrainingError(
            f"{len(failures)} expert(s) could not be fitted ({reasons}); finished ones are kept, so run again"
        )


class _Reporter:
    """Reads what the workers wrote about their progress, and tells it when it changed."""

    def __init__(self, jobs: Sequence[ExpertJob], report: Report | None, scores: CandidateScores) -> None:
        self._jobs = jobs
        self._report = report
        self._scores = scores
        self._last: Progress | None = None

    def report(self) -> None:
        """Tell the steps done by all experts, and the step and loss of each that is being fitted, if they changed."""
        if self._report is None:
            return
        states = [(job, *_progress_of(job)) for job in self._jobs]
        done, total = sum(step for _, step, _, _ in states), sum(last for *_, last in states)
        running = [f"{job.name} {step}/{last} loss {loss:.3f}" for job, step, loss, last in states if 0 < step < last]
        words = [*running, self._scores.detail()] if self._scores.detail() else running
        detail = " · ".join(words) or ("finished" if done == total else "starting")
        progress = Progress("train", done, total, detail)
        if progress != self._last:
            self._last = progress
            self._report(progress)


def _progress_of(job: ExpertJob) -> tuple[int, float, int]:
    """Return the steps done, the loss and the last step, which is an earlier one where training stopped early."""
    result = finished_result(job)
    if result is not None:
        return result.steps, result.loss, result.steps
    if not job.folder.exists(job.directory, "progress.json"):
        return 0, 0.0, job.config.steps
    state = job.folder.read_json(job.directory, "progress.json")
    return state["step"], state["loss"], job.config.steps
