"""What a Ray Train worker runs: one expert's LoRA, fitted with DeepSpeed on encoded examples, resumable to the step."""

import logging
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import deepspeed.ops
import ray.train
import torch
from deepspeed.utils import safe_get_full_fp32_param
from diffusers.optimization import get_scheduler

from selma_ray.errors import TrainingError
from selma_ray.experts.adapter import add_adapter, export_adapter, trainable_parameters
from selma_ray.experts.examples import EncodedExamples, batch_positions, example_generators
from selma_ray.experts.job import ExpertJob, ExpertResult, mean_of_tail
from selma_ray.experts.precision import deepspeed_config, resolve_precision
from selma_ray.models.family import Family, open_family
from selma_ray.records import seed_of

__all__ = ["fit_expert"]

logger = logging.getLogger(__name__)

_TAG = "state"  # name of DeepSpeed's folder inside a checkpoint
_PROGRESS_EVERY_S = 1.0


@dataclass
class Curve:
    """Loss and learning rate of every step so far; travels inside checkpoints."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, float]]:
        """Return one row per step, counted from 1."""
        pairs = zip(self.loss, self.learning_rate, strict=True)
        return [{"step": step, "loss": loss, "learning_rate": rate} for step, (loss, rate) in enumerate(pairs, start=1)]


def fit_expert(job: ExpertJob) -> None:
    """Fit one expert from its last checkpoint, or from the start, and export its adapter; runs on every worker."""
    started_s = time.monotonic()
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    family = open_family(job.model)
    examples = EncodedExamples(job.folder, job.caches)
    precision = resolve_precision(job.config.precision)
    engine = _open_engine(job, family, precision)
    curve = _restore(engine)
    progress = _ProgressFile(job)
    for step in range(len(curve.loss), job.config.steps):
        curve.learning_rate.append(engine.get_lr()[0])
        curve.loss.append(_train_step(engine, family, examples, job, step))
        progress.update(step + 1, curve.loss[-1])
        if (step + 1) % job.config.checkpoint_every_steps == 0 and step + 1 < job.config.steps:
            _checkpoint(engine, curve)
    weights = _full_weights(engine)
    if ray.train.get_context().get_world_rank() == 0:
        seconds = round(time.monotonic() - started_s, 2)
        _export(job, engine, weights, curve, len(examples), precision, seconds)


def _open_engine(job: ExpertJob, family: Family, precision: str) -> Any:
    """Return the DeepSpeed engine around the denoiser with its adapter, AdamW and learning-rate schedule."""
    config = job.config
    model = add_adapter(family.load_denoiser(), config.lora, job.model.name, job.seed)
    model.train()
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps)
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory collective when it starts; gloo serves, and needs no compiler.
        deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        model_parameters=parameters,
        config=deepspeed_config(config, precision),
    )
    return engine


def _train_step(engine: Any, family: Family, examples: EncodedExamples, job: ExpertJob, step: int) -> float:
    """Run one optimiser step on this worker's share of the global batch; returns the global batch's mean loss."""
    config, context = job.config, ray.train.get_context()
    seed = seed_of(job.seed, expert=job.name)
    positions = batch_positions(len(examples), config.batch_size, step, seed)
    share = config.batch_size // context.get_world_size()
    micro = config.micro_batch_size or share
    first = context.get_world_rank() * share
    total = torch.zeros((), device=engine.device)
    for start in range(first, first + share, micro):
        places = range(start, start + micro)
        batch = examples.batch([positions[place] for place in places])
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = family.loss(engine, batch, example_generators(step, places, seed))
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    total /= share // micro
    if context.get_world_size() > 1:
        torch.distributed.all_reduce(total)
        total /= context.get_world_size()
    if not torch.isfinite(total):
        raise TrainingError(
            f"loss of expert {job.name} is {total.item()} at step {step + 1}; lower experts.learning_rate"
        )
    return total.item()


def _checkpoint(engine: Any, curve: Curve) -> None:
    """Hand Ray Train a checkpoint of optimiser, schedule, adapter and curve; the frozen weights stay out."""
    with tempfile.TemporaryDirectory() as directory:
        state = {"loss": curve.loss, "learning_rate": curve.learning_rate}
        engine.save_checkpoint(directory, tag=_TAG, client_state=state, exclude_frozen_parameters=True)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": len(curve.loss), "loss": curve.loss[-1]}, checkpoint=checkpoint)


def _restore(engine: Any) -> Curve:
    """Load the last checkpoint, if there is one; returns the curve up to it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Curve()
    with checkpoint.as_directory() as directory:
        _, state = engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
    logger.info("resuming at step %d", len(state["loss"]))
    return Curve(loss=state["loss"], learning_rate=state["learning_rate"])


def _full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's fp32 weights by name, gathered over workers (a collective: every worker calls it)."""
    weights = {}
    for name, parameter in trainable_parameters(engine.module).items():
        master = safe_get_full_fp32_param(parameter)
        weights[name] = (parameter if master is None else master).detach().float().cpu().clone()
    return weights


def _export(
    job: ExpertJob,
    engine: Any,
    weights: dict[str, torch.Tensor],
    curve: Curve,
    examples: int,
    precision: str,
    seconds: float,
) -> None:
    loss = mean_of_tail(curve.loss)
    result = ExpertResult(job.name, job.key, loss, len(curve.loss), examples, precision, seconds)
    job.folder.delete(job.directory, "adapter_config.json")
    job.folder.write_json(curve.rows(), job.directory, "curve.json")
    job.folder.write_json(result.as_dict(), job.directory, "result.json")
    export_adapter(engine.module, weights, job.folder, job.directory)


class _ProgressFile:
    """Tells the driver, about once a second, how far the expert has come, through the folder that all nodes share."""

    def __init__(self, job: ExpertJob) -> None:
        self._job = job
        self._written_s = 0.0
        self._speaks = ray.train.get_context().get_world_rank() == 0

    def update(self, step: int, loss: float) -> None:
        due = time.monotonic() - self._written_s >= _PROGRESS_EVERY_S or step == self._job.config.steps
        if self._speaks and due:
            self._written_s = time.monotonic()
            self._job.folder.write_json({"step": step, "loss": loss}, self._job.directory, "progress.json")
