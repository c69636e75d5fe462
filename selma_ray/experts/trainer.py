"""One expert's training in one process: DeepSpeed around a denoiser with LoRA, fed by encoded examples. Knows no Ray."""

from dataclasses import dataclass, field
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from diffusers.optimization import get_scheduler

from selma_ray.errors import TrainingError
from selma_ray.experts.adapter import add_adapter, export_adapter, trainable_parameters
from selma_ray.experts.examples import EncodedExamples, batch_positions, dropped_captions, example_generators
from selma_ray.experts.job import ExpertJob, ExpertResult, mean_of_tail
from selma_ray.experts.precision import deepspeed_config, resolve_precision
from selma_ray.models.family import open_family
from selma_ray.records import seed_of

__all__ = ["Curve", "ExpertTrainer"]

_TAG = "state"  # name of DeepSpeed's folder inside a checkpoint


@dataclass
class Curve:
    """Loss and learning rate of every step so far."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, float]]:
        """Return one row per step, counted from 1."""
        pairs = zip(self.loss, self.learning_rate, strict=True)
        return [{"step": step, "loss": loss, "learning_rate": rate} for step, (loss, rate) in enumerate(pairs, start=1)]


class ExpertTrainer:
    """Takes optimiser steps and saves, loads and exports what they gave; torch.distributed must be up."""

    def __init__(self, job: ExpertJob, rank: int = 0, world_size: int = 1) -> None:
        self.job = job
        self.curve = Curve()
        self._rank = rank
        self._world_size = world_size
        self._seed = seed_of(job.seed, expert=job.name)
        self._family = open_family(job.model)
        self._examples = EncodedExamples(job.folder, job.caches)
        self._precision = resolve_precision(job.config.precision)
        self._engine = self._open_engine()

    @property
    def steps_done(self) -> int:
        """Return the number of optimiser steps taken, those of loaded checkpoints included."""
        return len(self.curve.loss)

    def step(self) -> float:
        """Take one optimiser step on this worker's share of the global batch; returns the global batch's mean loss.

        What it does depends on the seed and the number of the step alone, whatever the number of workers. Raises
        TrainingError where the loss is not finite.
        """
        config = self.job.config
        learning_rate = self._engine.get_lr()[0]
        share = config.batch_size // self._world_size
        micro = config.micro_batch_size or share
        first = self._rank * share
        losses = [self._micro_step(range(start, start + micro)) for start in range(first, first + share, micro)]
        loss = self._global_mean(torch.stack(losses).mean())
        self.curve.loss.append(loss)
        self.curve.learning_rate.append(learning_rate)
        return loss

    def save(self, directory: str) -> None:
        """Write adapter, optimiser, schedule and curve to `directory`, without the frozen weights; every worker calls it."""
        state = {"loss": self.curve.loss, "learning_rate": self.curve.learning_rate}
        self._engine.save_checkpoint(directory, tag=_TAG, client_state=state, exclude_frozen_parameters=True)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote; every worker calls it."""
        _, state = self._engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
        self.curve = Curve(loss=state["loss"], learning_rate=state["learning_rate"])

    def export_candidate(self) -> None:
        """Leave the adapter as it is now to be chosen from, unless it is there; every worker calls it, the first one writes."""
        weights = self._full_weights()
        directory = self.job.candidate(self.steps_done)
        if self._rank == 0 and not self.job.folder.exists(directory, "adapter_config.json"):
            export_adapter(self._engine.module, weights, self.job.folder, directory)

    def export(self, seconds: float) -> None:
        """Write the adapter, its curve and its result to the expert's folder; every worker calls it, the first one writes.

        Where a checkpoint is to be chosen, the candidates are the adapters, and none is written here.
        """
        job, curve = self.job, self.curve
        weights = self._full_weights()
        if self._rank:
            return
        loss = mean_of_tail(curve.loss)
        result = ExpertResult(
            job.name, job.key, loss, len(curve.loss), len(self._examples), self._precision, round(seconds, 2)
        )
        job.folder.delete(job.directory, "adapter_config.json")  # whose return means that all files belong together
        job.folder.write_json(curve.rows(), job.directory, "curve.json")
        job.folder.write_json(result.as_dict(), job.directory, "result.json")
        if not job.candidate_steps:
            export_adapter(self._engine.module, weights, job.folder, job.directory)

    def _open_engine(self) -> Any:
        config = self.job.config
        denoiser = self._family.load_denoiser()
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        revision = self._family.located.revision
        model = add_adapter(denoiser, config.lora, self.job.model.name, self.job.seed, revision)
        model.train()
        parameters = list(trainable_parameters(model).values())
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        schedule = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        if not torch.cuda.is_available():
            # DeepSpeed would compile a shared-memory collective when it starts; gloo serves, and needs no compiler.
            deepspeed.ops.__compatible_ops__ = {}
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=parameters,
            config=deepspeed_config(config, self._precision),
        )
        return engine

    def _micro_step(self, places: range) -> torch.Tensor:
        """Accumulate the gradient of the examples at `places` of the global batch; the last of a step moves the weights."""
        step = self.steps_done
        positions = batch_positions(len(self._examples), self.job.config.batch_size, step, self._seed)
        batch = self._examples.batch([positions[place] for place in places])
        dropped = dropped_captions(step, places, self._seed, self.job.config.caption_dropout)
        batch = {
            name: tensor.to(self._engine.device) for name, tensor in self._examples.without(batch, dropped).items()
        }
        generators = example_generators(step, places, self._seed)
        loss = self._family.loss(self._engine, batch, generators, self.job.config.min_snr_gamma)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def _global_mean(self, loss: torch.Tensor) -> float:
        if self._world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self._world_size
        if not torch.isfinite(loss):
            raise TrainingError(
                f"loss of expert {self.job.name} must be finite, got {loss.item()} at step {self.steps_done + 1}; "
                "lower experts.learning_rate"
            )
        return loss.item()

    def _full_weights(self) -> dict[str, torch.Tensor]:
        weights = {}
        for name, parameter in trainable_parameters(self._engine.module).items():
            master = safe_get_full_fp32_param(parameter)  # none under ZeRO 0, which does not show its masters
            weights[name] = (parameter if master is None else master).detach().float().cpu().clone()
        return weights
