"""Fitting an expert: steps a second against diffusers' script, and memory against what `selma plan` says, mode by mode."""

import contextlib
import itertools
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_parts.device import fp32_products, free_memory, peak_memory, rates_in_turns
from benchmarks.gpu_parts.diffusers_training import diffusers_steps
from benchmarks.gpu_parts.examples import random_job
from benchmarks.gpu_parts.pipelines import Subject, random_part
from benchmarks.gpu_parts.plans import Plans
from benchmarks.gpu_parts.report import Report
from selma_ray.adapters.files import is_adapter
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.trainer import ExpertTrainer
from selma_ray.models.family import open_family
from selma_ray.models.parts import DENOISERS
from selma_ray.storage import RunFolder

__all__ = ["fit_steps", "measure_training", "modes"]

PART = "training"
_STEPS_A_TURN = 2
_STEPS = 2
"""Steps that are watched for memory: the second has the optimiser's state."""


def modes(config: ExpertsConfig) -> Iterator[tuple[str, ExpertsConfig]]:
    """Yield every way to keep the base and the activations, the recipe's own first."""
    kept = typing.get_args(ExpertsConfig.model_fields["base_weights"].annotation)
    own = config.gradient_checkpointing
    for weights, checkpointing in itertools.product(kept, (own, not own)):
        changes = {"gradient_checkpointing": checkpointing, "base_weights": weights}
        name = f"{'checkpointing' if checkpointing else 'no checkpointing'}, {weights}"
        yield name, ExpertsConfig.model_validate(config.model_dump() | changes)


def measure_training(subject: Subject, device: torch.device, report: Report, plans: Plans) -> None:
    """Measure one family: the recipe's own mode against diffusers' script, then the memory of every mode; a process group must be up."""
    name = subject.family
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(path)
        report.measure(PART, f"{name} speed", lambda: _speed(subject, device, report, folder))
        for mode, config in modes(subject.experts):
            if report.seconds_left() < 0:
                report.put(PART, f"{name} {mode}", {"skipped": "out of time"})
                continue
            report.measure(
                PART, f"{name} {mode}", lambda config=config: _memory(subject, config, device, folder, plans)
            )  # type: ignore[misc]


def fit_steps(subject: Subject, config: ExpertsConfig, device: torch.device, folder: RunFolder) -> dict[str, Any]:
    """Take two steps and export; returns the losses, and whether an adapter is there."""
    # bitsandbytes quantises what comes from the host's memory.
    with random_denoisers(device, kept_on=torch.device("cpu") if config.base_weights != "full" else device):
        trainer = ExpertTrainer(random_job(subject, config, folder))
    try:
        losses = [trainer.step() for _ in range(_STEPS)]
        trainer.export(seconds=0)
        return {"losses": losses, "exported": is_adapter(folder, trainer.job.directory)}
    finally:
        trainer.close()


def _taken(steps: Iterator[float]) -> list[float]:
    with fp32_products("highest"):
        return list(itertools.islice(steps, _STEPS_A_TURN))


@contextmanager
def random_denoisers(device: torch.device, kept_on: torch.device) -> Iterator[None]:
    """Let trainers make their denoiser on the device, with random weights, where they would load one."""

    def opened(model: Any) -> Any:
        family = open_family(model)

        def load_denoiser(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
            folder = Path(model.name)
            name = next(each for each in DENOISERS if (folder / each).is_dir())
            torch.manual_seed(0)  # the same weights in every mode
            return random_part(folder, name, dtype, device).to(kept_on)

        family.load_denoiser = load_denoiser  # type: ignore[method-assign]
        return family

    with mock.patch("selma_ray.experts.trainer.open_family", opened):
        yield


def _memory(
    subject: Subject, config: ExpertsConfig, device: torch.device, folder: RunFolder, plans: Plans
) -> dict[str, Any]:
    """Return the most that a worker's tensors take, from loading to export, beside what the plan says."""
    free_memory()
    with peak_memory(device) as memory:
        found = fit_steps(subject, config, device, folder)
    planned = plans.memory_bytes(subject.family, config)
    return {
        "peak_bytes": memory.added_bytes,
        "planned_bytes": round(planned),
        "peak_over_plan": round(memory.added_bytes / planned, 3),
        **found,
    }


def _speed(subject: Subject, device: torch.device, report: Report, folder: RunFolder) -> dict[str, Any]:
    """Return steps/s of our trainer, and of diffusers' loop with encoding at every step and with examples encoded before."""
    with random_denoisers(device, kept_on=device):
        trainer = ExpertTrainer(random_job(subject, subject.experts, folder))
    try:
        encoding, cached = (_against(trainer, subject, device, report, encode=encode) for encode in (True, False))
    finally:
        trainer.close()
    return {
        "batch_size": subject.experts.batch_size,
        "rank": subject.experts.lora.rank,
        "precision": subject.experts.precision,
        "gradient_checkpointing": subject.experts.gradient_checkpointing,
        "ours_steps_per_s": round(encoding["ours"], 4),
        "diffusers_encoding_steps_per_s": round(encoding["diffusers"], 4),
        "diffusers_cached_steps_per_s": round(cached["diffusers"], 4),
        "train_over_diffusers": round(encoding["ours"] / encoding["diffusers"], 3),
        "train_over_diffusers_cached": round(cached["ours"] / cached["diffusers"], 3),
    }


def _against(
    trainer: ExpertTrainer, subject: Subject, device: torch.device, report: Report, *, encode: bool
) -> dict[str, float]:
    """Return the steps/s of a trainer and of diffusers' loop in turns, within half of the time that is left."""
    theirs = diffusers_steps(subject, device, encode=encode)
    ways = {
        "ours": lambda: [trainer.step() for _ in range(_STEPS_A_TURN)],
        "diffusers": lambda: _taken(theirs),
    }
    with report.share(0.5), contextlib.closing(theirs):
        rates = rates_in_turns(ways, device, report.seconds_left, subject.rounds)
    free_memory()
    return {way: _STEPS_A_TURN * rate for way, rate in rates.items()}
