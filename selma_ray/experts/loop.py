"""What a Ray Train worker runs: the training of a lane's experts, with checkpoints that Ray Train keeps and goes on from."""

import gc
import logging
import tempfile
import time
from pathlib import Path

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from selma_ray.cluster.metrics import count
from selma_ray.experts.curves import CurveLog
from selma_ray.experts.fused_loop import fit_fused
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.lanes import Lane
from selma_ray.experts.progress_file import ProgressFile
from selma_ray.experts.selection import stopped_at
from selma_ray.experts.trainer import ExpertTrainer, trainer_of

__all__ = ["fit_experts"]

logger = logging.getLogger(__name__)


def fit_experts(lane: Lane) -> None:
    """Fit the experts of a lane that are not fitted, one after another, the first from its last checkpoint; runs on every worker."""
    # Workers must agree, and a shared folder may not show all of them the same.
    names = broadcast_from_rank_zero([job.name for job in lane.unfitted()])
    if lane.fused and names:
        fit_fused(lane)  # all of them, as those that are fitted would be fitted alike
        return
    torch.set_num_threads(lane.num_threads)
    for job in lane.jobs:
        if job.name in names:
            _fit_expert(job)
            gc.collect()  # engines hold themselves in cycles, and the next denoiser needs the memory


def _fit_expert(job: ExpertJob) -> None:
    started_s = time.monotonic()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    trainer = trainer_of(job, rank, context.get_world_size())
    _restore(trainer)
    progress = ProgressFile(job) if rank == 0 else None
    curves = CurveLog(job, trainer.steps_done) if rank == 0 else None
    while trainer.steps_done < job.config.steps and not _is_stopped(trainer):
        loss = trainer.step()
        step = trainer.steps_done
        if progress and curves:
            progress.update(step, loss)
            curves.add(step, trainer.curve.latest())
            count("selma_training_steps", 1, job.folder.uri, "train", expert=job.name)
        if step in job.candidate_steps:
            trainer.export_candidate()
        if step % job.config.checkpoint_every_steps == 0 and step < job.config.steps:
            _checkpoint(trainer)
            if curves:
                curves.keep()
    if curves:
        curves.close()
    trainer.export(time.monotonic() - started_s)
    trainer.close()


def _is_stopped(trainer: ExpertTrainer) -> bool:
    """Tell, on every worker alike, whether the dev scores say that training is over; they are looked at where one may have come."""
    job = trainer.job
    if not job.config.early_stop or trainer.steps_done not in (0, *job.candidate_steps):
        return False
    return bool(broadcast_from_rank_zero(stopped_at(job) is not None))


def _restore(trainer: ExpertTrainer) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as directory:
        if not Path(directory, _key_file(trainer.job)).exists():
            return  # of an expert before this one
        trainer.load(directory)
    logger.info("expert %s goes on at step %d", trainer.job.name, trainer.steps_done)


def _checkpoint(trainer: ExpertTrainer) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer.save(directory)
        Path(directory, _key_file(trainer.job)).touch()
        metrics = {"step": trainer.steps_done, "loss": trainer.curve.loss[-1]}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _key_file(job: ExpertJob) -> str:
    return f"expert-{job.key}"
