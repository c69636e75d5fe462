"""Several experts that share one base in one process and one forward pass; torch alone, as their adapters are all that is trained.

Each expert sees the examples, noise, clipping and optimiser steps of its own that it would see alone, so what comes out differs from
separate training by rounding. DeepSpeed would clip the gradients of all experts as one.

Shapes: K experts, N examples of an expert.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file

from selma_ray.adapters.files import ADAPTER_FILES, CONFIG_FILE, is_adapter
from selma_ray.adapters.fused import FusedAdapters
from selma_ray.adapters.peft_format import write_adapter
from selma_ray.errors import TrainingError
from selma_ray.experts.examples import EncodedExamples, dropped_captions, example_generators
from selma_ray.experts.figures import Curve, by_noise_level
from selma_ray.experts.job import ExpertJob, ExpertResult, mean_of_tail
from selma_ray.experts.precision import resolve_precision
from selma_ray.models.conditions import stacked
from selma_ray.models.device import device_of
from selma_ray.models.family import LossSettings, open_family
from selma_ray.models.parts import DTYPES
from selma_ray.models.quantised import quantise
from selma_ray.records import seed_of

__all__ = ["FusedTrainer", "fused_trainer_of"]

_STATE, _PROGRESS = "state.safetensors", "progress.json"


class FusedTrainer:
    """Takes optimiser steps of all experts at once, and saves, loads and exports what they gave."""

    def __init__(self, jobs: Sequence[ExpertJob], rank: int = 0, world_size: int = 1) -> None:
        first = jobs[0]
        self.jobs, self.config = jobs, first.config
        self.curves = [Curve() for _ in jobs]
        self._rank, self._world_size = rank, world_size
        self._seeds = [seed_of(job.seed, expert=job.name) for job in jobs]
        self._family = open_family(first.model)
        self._examples = [self._open_examples(job) for job in jobs]
        self._device = device_of(self.config.gpus_per_worker, "experts.gpus_per_worker")
        self._precision = resolve_precision(self.config.precision, self._device)
        self._loss = LossSettings(self.config.min_snr_gamma, self.config.guidance_scale)
        if self._device.type == "cuda" and first.model.card.tf32:
            torch.set_float32_matmul_precision("high")
        self._adapters = FusedAdapters(
            self._base(), self.config.lora, len(jobs), first.model.name, first.seed
        ).to(self._device)  # fmt: skip
        self._adapters.denoiser.train()
        self._optimizer = torch.optim.AdamW(
            self._adapters.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.999), weight_decay=self.config.weight_decay
        )  # fmt: skip
        self._schedule = get_scheduler(
            "constant_with_warmup" if self.config.schedule == "constant" else self.config.schedule,
            self._optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.config.steps,
        )

    @property
    def steps_done(self) -> int:
        """Return the number of optimiser steps taken, those of loaded checkpoints included."""
        return len(self.curves[0].loss)

    def step(self) -> list[float]:
        """Take one optimiser step of every expert; returns their mean losses. Raises TrainingError where one is not finite."""
        learning_rate = self._schedule.get_last_lr()[0]
        share = self.config.batch_size // self._world_size
        micro, first = self.config.micro_batch_size or share, self._rank * share
        starts = range(first, first + share, micro)
        self._optimizer.zero_grad()
        figures = []
        for start in starts:
            figures.append(self._figures(range(start, start + micro)))
            (figures[-1]["loss"] / len(starts)).sum().backward()
        means = self._shared_means(
            {name: torch.stack([each[name].detach() for each in figures]).mean(0) for name in figures[0]}
        )
        self._clip()
        self._optimizer.step()
        self._schedule.step()
        for k, curve in enumerate(self.curves):
            curve.add({name: values[k] for name, values in means.items()}, learning_rate)
        return means["loss"]

    def save(self, directory: str) -> None:
        """Write adapters, optimiser and curves to `directory`; every worker calls it, all with the same content."""
        tensors, states = {}, self._optimizer.state
        for index, parameter in enumerate(self._adapters.parameters()):
            tensors[f"{index}.weight"] = parameter.detach().cpu().clone()
            tensors |= {
                f"{index}.{name}": torch.as_tensor(value).cpu().clone() for name, value in states[parameter].items()
            }
        save_file({**tensors, **self._further_tensors()}, Path(directory, _STATE))
        state = {"curves": [vars(curve) for curve in self.curves], "schedule": self._schedule.state_dict()}
        Path(directory, _PROGRESS).write_text(json.dumps(state))

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote."""
        tensors = load_file(Path(directory, _STATE))
        for index, parameter in enumerate(self._adapters.parameters()):
            parameter.data.copy_(tensors.pop(f"{index}.weight"))
            names = [name.partition(".")[2] for name in tensors if name.startswith(f"{index}.")]
            self._optimizer.state[parameter] = {
                name: tensors[f"{index}.{name}"].to("cpu" if name == "step" else self._device) for name in names
            }
        self._restore_further(tensors)
        saved = json.loads(Path(directory, _PROGRESS).read_text())
        known = [each.name for each in fields(Curve)]
        self.curves = [Curve(**{name: curve.get(name, []) for name in known}) for curve in saved["curves"]]
        self._schedule.load_state_dict(saved["schedule"])
        for group, learning_rate in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = learning_rate

    def export_candidates(self) -> None:
        """Leave the adapters as they are now to be chosen from, unless they are there."""
        for k, job in enumerate(self.jobs):
            directory = job.candidate(self.steps_done)
            if self._rank == 0 and not is_adapter(job.folder, directory):
                self._write_adapter(k, directory)

    def export(self, seconds: float) -> None:
        """Write every expert's adapter, curve and result to its folder; the first worker writes."""
        if self._rank:
            return
        for k, (job, curve) in enumerate(zip(self.jobs, self.curves, strict=True)):
            result = ExpertResult(
                job.name, job.key, mean_of_tail(curve.loss), len(curve.loss), self._examples_seen(k), self._precision,
                round(seconds, 2),
            )  # fmt: skip
            job.folder.delete(job.directory, CONFIG_FILE)  # whose return means that all files belong together
            job.folder.write_json(curve.rows(), job.directory, "curve.json")
            job.folder.write_json(result.as_dict(), job.directory, "result.json")
            if not job.candidate_steps:
                self._write_adapter(k, job.directory)

    def _open_examples(self, job: ExpertJob) -> Any:
        return EncodedExamples(job.folder, job.caches)

    def _examples_seen(self, k: int) -> int:
        return len(self._examples[k])

    def _further_tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps beside weights and optimiser, under names that begin with no number."""
        return {}

    def _restore_further(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `_further_tensors` gave."""

    def _base(self) -> Any:
        config, dtype = self.config, DTYPES[self._precision]
        denoiser: Any = self._family.load_denoiser(dtype)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if config.base_weights != "full":
            quantise(denoiser, config.base_weights, dtype)
        return denoiser

    def _figures(self, places: range) -> dict[str, torch.Tensor]:
        """Return each expert's figures (K each), its loss among them, of its own examples at `places` of its global batch.

        All come from one forward pass.
        """
        batches, generators = [], []
        for examples, seed in zip(self._examples, self._seeds, strict=True):
            positions = examples.positions(self.config.batch_size, self.steps_done, seed)
            batch = examples.batch([positions[place] for place in places])
            dropped = dropped_captions(self.steps_done, places, seed, self.config.caption_dropout)
            batches.append(examples.without(batch, dropped))
            generators += example_generators(self.steps_done, places, seed)
        together = {name: tensor.to(self._device) for name, tensor in stacked(batches).items()}
        errors, levels = self._family.errors_by_level(self._adapters.denoiser, together, generators, self._loss)
        errors_KN, levels_KN = (each.unflatten(0, (len(self.jobs), -1)) for each in (errors, levels))
        by_level = [by_noise_level(*of_expert) for of_expert in zip(errors_KN, levels_KN, strict=True)]
        return {
            "loss": errors_KN.mean(1),
            **{name: torch.stack([each[name] for each in by_level]) for name in by_level[0]},
        }

    def _shared_means(self, figures: dict[str, torch.Tensor]) -> dict[str, list[float]]:
        """Average figures and gradients over the workers."""
        if self._world_size > 1:
            for tensor in (
                *figures.values(),
                *(each.grad for each in self._adapters.parameters() if each.grad is not None),
            ):
                torch.distributed.all_reduce(tensor)
                tensor /= self._world_size
        for job, loss in zip(self.jobs, figures["loss"].tolist(), strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"loss of expert {job.name} must be finite, got {loss} at step {self.steps_done + 1}; lower experts.learning_rate"
                )
        return {name: values.tolist() for name, values in figures.items()}

    def _clip(self) -> None:
        """Clip the gradient of each expert by its own norm."""
        gradients = [each.grad for each in self._adapters.parameters() if each.grad is not None]
        norms_K = torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0).sqrt()
        factors_K = (self.config.gradient_clip / (norms_K + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factors_K.view(-1, 1, 1))

    def _write_adapter(self, k: int, directory: str) -> None:
        job, revision = self.jobs[k], self._family.located.revision
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary)
            shapes = self._adapters.shapes
            write_adapter(target, self._adapters.adapter(k), shapes, self._adapters.rank, job.model.name, revision)
            for name in ADAPTER_FILES:
                job.folder.write_bytes((target / name).read_bytes(), directory, name)


def fused_trainer_of(jobs: Sequence[ExpertJob], rank: int = 0, world_size: int = 1) -> FusedTrainer:
    """Return what fits experts as one: to images that are there, or to those of rounds that their own adapters draw."""
    if jobs[0].rounds is None:
        return FusedTrainer(jobs, rank, world_size)
    from selma_ray.experts.fused_nft_trainer import FusedNftTrainer

    return FusedNftTrainer(jobs, rank, world_size)
