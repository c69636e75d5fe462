"""An expert's training in rounds, DiffusionNFT (2509.16117): publish the adapter that draws, wait for its images, learn from them.

Images are drawn elsewhere, by whoever follows the rounds' folders. The trainer knows no Ray.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from selma_ray.adapters.training import export_adapter, trainable_parameters
from selma_ray.experts.examples import example_generators
from selma_ray.experts.expert_rounds import ExpertRounds
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.nft_loss import nft_loss
from selma_ray.experts.round_examples import REWARDS
from selma_ray.experts.trainer import ExpertTrainer
from selma_ray.models.family import Batch
from selma_ray.order import batch_positions
from selma_ray.records import seed_of

__all__ = ["NftTrainer"]


class NftTrainer(ExpertTrainer):
    """Takes the optimiser steps of one round after another; the old adapter follows the trained one as `experts.nft` says."""

    def __init__(self, job: ExpertJob, rank: int = 0, world_size: int = 1) -> None:
        self.rounds = ExpertRounds(job, writes=rank == 0)
        self._nft = self.rounds.nft
        self._loaded: int | None = None
        super().__init__(job, rank, world_size)
        self._set_old(self._whole_weights())

    def step(self) -> float:
        """Take one optimiser step; at the start of a round its images are waited for, at its end the old adapter follows.

        Raises TrainingError where no images will come, or where they teach nothing.
        """
        round_ = self.rounds.at(self.steps_done)
        if self._loaded != round_.number:
            self.rounds.publish(round_, self._write_old)
            self.rounds.open(round_)
            self._examples, self._loaded = self.rounds.examples, round_.number
        loss = super().step()
        self.rounds.note(self.curve)
        if self.rounds.ends_round(self.steps_done):
            self._follow(self._nft.share_after(round_.number))
        return loss

    def save(self, directory: str) -> None:
        """Write a checkpoint; the examples of rounds that the checkpoint before it holds are given up."""
        super().save(directory)
        self.rounds.saved(self.steps_done)

    def export(self, seconds: float) -> None:
        """Write the trained adapter, then give up all examples."""
        super().export(seconds)
        self.rounds.ended()

    def _write_old(self, directory: str) -> None:
        export_adapter(self._engine.module, self._old, self.job.folder, directory)

    def _open_examples(self) -> Any:
        return ()  # until the first round's are drawn

    def _examples_seen(self) -> int:
        return self._nft.rounds * self._nft.prompts_per_round * self._nft.images_per_prompt

    def _positions(self) -> list[int]:
        seed = seed_of(self._seed, round=self.rounds.at(self.steps_done).number)
        step = self.steps_done % self.rounds.steps_per_round
        return batch_positions(len(self._examples), self.job.config.batch_size, step, seed)

    def _figures(self, batch: Batch, step: int, places: range) -> dict[str, torch.Tensor]:
        examples = {name: tensor for name, tensor in batch.items() if name != REWARDS}
        noised = self._family.noised(examples, example_generators(step, places, self._seed), self._loss)
        with torch.no_grad(), self._old_weights():
            old_NChw = self._family.predict(self._engine, noised)
        loss_N = nft_loss(
            self._family.predict(self._engine, noised),
            old_NChw,
            noised.target,
            batch[REWARDS],
            self._nft.beta,
            noised.clean_scale if self._nft.normalised else None,
        )
        return {"loss": loss_N.mean()}

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.cpu().clone() for name, weight in self._trained_weights().items()}

    def _set_old(self, weights: dict[str, torch.Tensor]) -> None:
        """Keep the old adapter in fp32, as its steps may be too small for 16 bits, and beside it as the model computes with it."""
        self._old = weights
        self._placed_old = {
            name: weights[name].to(parameter.device, parameter.dtype)
            for name, parameter in trainable_parameters(self._engine.module).items()
        }

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """Let the old adapter predict; ZeRO up to stage 2 keeps whole weights in every process, so they change places."""
        parameters = trainable_parameters(self._engine.module)
        new = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self._placed_old[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = new[name]

    def _follow(self, share: float) -> None:
        """Move the old adapter to share * old + (1 - share) * new, factor by factor, as the paper's code does."""
        new = self._whole_weights()
        self._set_old({name: torch.lerp(old, new[name], 1 - share) for name, old in self._old.items()})

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "old": self._old}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._set_old(state["old"])
        self.rounds.restored(self.steps_done)
