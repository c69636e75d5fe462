"""One expert's training in one process: DeepSpeed around a denoiser with LoRA, fed by encoded examples. Knows no Ray."""

from dataclasses import fields
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from selma_ray.adapters.files import CONFIG_FILE, is_adapter, local_adapter
from selma_ray.adapters.mixture_of_experts import Factors, add_mixture, read_experts, write_mixture
from selma_ray.adapters.training import add_adapter, export_adapter, trainable_parameters
from selma_ray.errors import TrainingError
from selma_ray.experts.averaging import AveragedWeights
from selma_ray.experts.examples import EncodedExamples, dropped_captions, example_generators
from selma_ray.experts.figures import Curve, by_noise_level
from selma_ray.experts.job import ExpertJob, ExpertResult, mean_of_tail
from selma_ray.experts.optimizers import open_optimizer
from selma_ray.experts.precision import deepspeed_config, resolve_precision
from selma_ray.experts.preferences import preference_loss
from selma_ray.imports import as_if_absent
from selma_ray.models.device import device_of
from selma_ray.models.family import Batch, LossSettings, open_family
from selma_ray.models.parts import DTYPES
from selma_ray.models.quantised import quantise
from selma_ray.records import seed_of

with as_if_absent("mlflow"):  # DeepSpeed's autotuner would import it, at seconds of every trainer's start.
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_fp32_param

__all__ = ["ExpertTrainer", "trainer_of"]

_TAG = "state"  # name of DeepSpeed's folder inside a checkpoint


class ExpertTrainer:
    """Takes optimiser steps and saves, loads and exports what they gave; torch.distributed must be up."""

    def __init__(self, job: ExpertJob, rank: int = 0, world_size: int = 1) -> None:
        self.job = job
        self.curve = Curve()
        self._rank = rank
        self._world_size = world_size
        self._seed = seed_of(job.seed, expert=job.name)
        self._family = open_family(job.model)
        self._examples = self._open_examples()
        self._device = device_of(job.config.gpus_per_worker, "experts.gpus_per_worker")
        self._precision = resolve_precision(job.config.precision, self._device)
        self._loss = LossSettings(job.config.min_snr_gamma, job.config.guidance_scale)
        if self._device.type == "cuda" and job.model.card.tf32:
            torch.set_float32_matmul_precision("high")
        self._engine = self._open_engine()
        self._average = AveragedWeights(job.config.ema, self._trained_weights()) if job.config.ema else None

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
        figures = [self._micro_step(range(start, start + micro)) for start in range(first, first + share, micro)]
        names, values = list(figures[0]), torch.stack([torch.stack([*each.values()]) for each in figures])
        self.curve.add(dict(zip(names, self._global_means(values.mean(0)), strict=True)), learning_rate)
        if self._average:
            self._average.update(self._trained_weights())
        return self.curve.loss[-1]

    def save(self, directory: str) -> None:
        """Write adapter, average, optimiser, schedule and curve to `directory`, without the frozen weights; every worker calls it."""
        self._engine.save_checkpoint(directory, tag=_TAG, client_state=self._state(), exclude_frozen_parameters=True)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote; every worker calls it."""
        _, state = self._engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
        self._restore(state)

    def export_candidate(self) -> None:
        """Leave the adapter as it is now to be chosen from, unless it is there; every worker calls it, the first one writes."""
        weights = self._kept_weights()
        directory = self.job.candidate(self.steps_done)
        if self._rank == 0 and not is_adapter(self.job.folder, directory):
            self._write_adapter(weights, directory)

    def export(self, seconds: float) -> None:
        """Write the adapter, its curve and its result to the expert's folder; every worker calls it, the first one writes.

        Where a checkpoint is to be chosen, the candidates are the adapters, and none is written here.
        """
        job, curve = self.job, self.curve
        weights = self._kept_weights()
        if self._rank:
            return
        loss = mean_of_tail(curve.loss)
        result = ExpertResult(
            job.name, job.key, loss, len(curve.loss), self._examples_seen(), self._precision, round(seconds, 2)
        )
        job.folder.delete(job.directory, CONFIG_FILE)  # whose return means that all files belong together
        job.folder.write_json(curve.rows(), job.directory, "curve.json")
        job.folder.write_json(result.as_dict(), job.directory, "result.json")
        if not job.candidate_steps:
            self._write_adapter(weights, job.directory)

    def close(self) -> None:
        """Give back what DeepSpeed holds, so that another expert can be fitted in this process."""
        self._engine.destroy()

    def _open_examples(self) -> Any:
        return EncodedExamples(self.job.folder, self.job.caches)

    def _examples_seen(self) -> int:
        return len(self._examples)

    def _positions(self) -> list[int]:
        """Return which examples the global batch of this step holds."""
        return self._examples.positions(self.job.config.batch_size, self.steps_done, self._seed)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside weights and optimiser."""
        return {**vars(self.curve), "average": self._average.state_dict() if self._average else None}

    def _restore(self, state: dict[str, Any]) -> None:
        self.curve = Curve(**{each.name: state.get(each.name, []) for each in fields(Curve)})
        if self._average:
            self._average.load_state_dict(state["average"])

    def _open_engine(self) -> Any:
        config = self.job.config
        model = self._adapted(self._base())
        model.train()
        parameters = list(trainable_parameters(model).values())
        optimizer = open_optimizer(parameters, config)
        schedule = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        if self._device.type == "cpu":
            # DeepSpeed would compile a shared-memory collective when it starts; gloo serves, and needs no compiler.
            deepspeed.ops.__compatible_ops__ = {}
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=parameters,
            config=deepspeed_config(config, self._precision, sum(each.numel() for each in parameters)),
        )
        return engine

    def _base(self) -> Any:
        """Load the frozen denoiser in what it is kept in; a quantised one is on the device, the others are moved by DeepSpeed."""
        config, dtype = self.job.config, DTYPES[self._precision]
        denoiser: Any = self._family.load_denoiser(dtype)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if config.base_weights != "full":
            quantise(denoiser, config.base_weights, dtype)
            denoiser.to(self._device)
        return denoiser

    def _adapted(self, denoiser: torch.nn.Module) -> torch.nn.Module:
        job = self.job
        if job.experts:
            add_mixture(denoiser, self._experts())
            return denoiser
        return add_adapter(denoiser, job.config.lora, job.model.name, job.seed, self._family.located.revision)

    def _experts(self) -> dict[str, Factors]:
        return read_experts([local_adapter(each.folder.path(each.directory)) for each in self.job.experts])

    def _write_adapter(self, weights: dict[str, torch.Tensor], directory: str) -> None:
        job = self.job
        if not job.experts:
            export_adapter(self._engine.module, weights, job.folder, directory)
            return
        names = [each.name for each in job.experts]
        revision = self._family.located.revision
        write_mixture(job.folder, directory, names, self._experts(), weights, job.model.name, revision)

    def _micro_step(self, places: range) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of the examples at `places` of the global batch; the last of a step moves the weights.

        Returns figures by name, the loss among them, whose means over all parts of the batch are those of the step.
        """
        config, step = self.job.config, self.steps_done
        positions = self._positions()
        batch = self._examples.batch([positions[place] for place in places])
        dropped = dropped_captions(step, places, self._seed, config.caption_dropout)
        if config.dpo:
            dropped = [*dropped, *(len(places) + row for row in dropped)]
        placed = self._on_device(self._examples.without(batch, dropped))
        figures = self._figures(placed, step, places)
        self._engine.backward(figures["loss"])
        self._engine.step()
        return {name: figure.detach() for name, figure in figures.items()}

    def _on_device(self, batch: Batch) -> Batch:
        if self._device.type != "cuda":
            return batch
        # From pinned memory a copy does not wait for the step before it.
        return {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _figures(self, batch: Batch, step: int, places: range) -> dict[str, torch.Tensor]:
        config = self.job.config
        if config.dpo is None:
            generators = example_generators(step, places, self._seed)
            errors_N, levels_N = self._family.errors_by_level(self._engine, batch, generators, self._loss)
            return {"loss": errors_N.mean(), **by_noise_level(errors_N, levels_N)}

        def errors_of_pairs() -> torch.Tensor:
            # Both images of a pair, under both denoisers, at one timestep and with one noise (2311.12908, section 4).
            generators = [each for _ in range(2) for each in example_generators(step, places, self._seed)]
            return self._family.errors(self._engine, batch, generators, self._loss)

        with torch.no_grad(), self._engine.module.disable_adapter():
            base_errors_2N = errors_of_pairs()
        loss, preferred = preference_loss(errors_of_pairs(), base_errors_2N, config.dpo.beta)
        return {"loss": loss, "preferred": preferred}

    def _global_means(self, figures: torch.Tensor) -> list[float]:
        if self._world_size > 1:
            torch.distributed.all_reduce(figures)
            figures = figures / self._world_size
        if not torch.isfinite(figures[0]):
            raise TrainingError(
                f"loss of expert {self.job.name} must be finite, got {figures[0].item()} at step {self.steps_done + 1}; "
                "lower experts.learning_rate"
            )
        return figures.tolist()

    def _kept_weights(self) -> dict[str, torch.Tensor]:
        """Return what is exported, on the CPU: the average of the weights where there is one."""
        if self._average:
            return self._average.weights()
        return {name: weight.cpu().clone() for name, weight in self._trained_weights().items()}

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the adapter's weights in fp32, whole, whatever ZeRO has split; every worker calls it."""
        weights = {}
        for name, parameter in trainable_parameters(self._engine.module).items():
            master = safe_get_full_fp32_param(parameter)  # none under ZeRO 0, which does not show its masters
            weights[name] = (parameter if master is None else master).detach().float()
        return weights


def trainer_of(job: ExpertJob, rank: int = 0, world_size: int = 1) -> ExpertTrainer:
    """Return what fits a job: to images that are there, or to those of rounds that its own adapter draws."""
    if job.rounds is None:
        return ExpertTrainer(job, rank, world_size)
    from selma_ray.experts.nft_trainer import NftTrainer

    return NftTrainer(job, rank, world_size)
