"""What a Ray Train worker runs for experts that are fitted as one: all of them from one checkpoint, each with its own curve."""

import logging
import tempfile
import time
from pathlib import Path

import ray.train
import torch

from selma_ray.cluster.metrics import count
from selma_ray.experts.curves import CurveLog
from selma_ray.experts.fused_trainer import FusedTrainer, fused_trainer_of
from selma_ray.experts.lanes import Lane
from selma_ray.experts.progress_file import ProgressFile

__all__ = ["fit_fused"]

logger = logging.getLogger(__name__)

_KEY_FILE = "fused-experts"


def fit_fused(lane: Lane) -> None:
    """Fit a lane's experts as one, from their last checkpoint or from the start; runs on every worker."""
    started_s, jobs, config = time.monotonic(), lane.jobs, lane.jobs[0].config
    torch.set_num_threads(lane.num_threads)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    trainer = fused_trainer_of(jobs, rank, context.get_world_size())
    _restore(trainer)
    watched = [(ProgressFile(job), CurveLog(job, trainer.steps_done)) for job in jobs] if rank == 0 else []
    while trainer.steps_done < config.steps:
        losses = trainer.step()
        step = trainer.steps_done
        for (progress, log), job, curve, loss in zip(watched, jobs, trainer.curves, losses, strict=False):
            progress.update(step, loss)
            log.add(step, curve.latest())
            count("selma_training_steps", 1, job.folder.uri, "train", expert=job.name)
        if step in jobs[0].candidate_steps:
            trainer.export_candidates()
        if step % config.checkpoint_every_steps == 0 and step < config.steps:
            _checkpoint(trainer)
            for _, log in watched:
                log.keep()
    for _, log in watched:
        log.close()
    trainer.export(time.monotonic() - started_s)


def _restore(trainer: FusedTrainer) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as directory:
        if Path(directory, _KEY_FILE).exists():
            trainer.load(directory)
    logger.info("experts %s go on at step %d", ", ".join(job.name for job in trainer.jobs), trainer.steps_done)


def _checkpoint(trainer: FusedTrainer) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer.save(directory)
        Path(directory, _KEY_FILE).touch()
        metrics = {"step": trainer.steps_done, "loss": trainer.curves[0].loss[-1]}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))
