"""Experts that learn in rounds, all of them in one process and one forward pass (DiffusionNFT, 2509.16117). Knows no Ray.

All reach a round's end together, so that the next round's images are drawn for all at once. Each expert takes the steps that it would take
alone, up to rounding.

Shapes: K experts, N examples of an expert, C latent channels, h x w latent pixels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from selma_ray.experts.examples import example_generators
from selma_ray.experts.expert_rounds import ExpertRounds
from selma_ray.experts.fused_trainer import FusedTrainer
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.nft_loss import nft_loss
from selma_ray.experts.round_examples import REWARDS
from selma_ray.models.conditions import stacked
from selma_ray.order import batch_positions
from selma_ray.records import seed_of

__all__ = ["FusedNftTrainer"]

_OLD = "old."


class FusedNftTrainer(FusedTrainer):
    """Takes the optimiser steps of one round after another for all experts; each old adapter follows its trained one."""

    def __init__(self, jobs: Sequence[ExpertJob], rank: int = 0, world_size: int = 1) -> None:
        self.rounds = [ExpertRounds(job, writes=rank == 0) for job in jobs]
        self._loaded: int | None = None
        super().__init__(jobs, rank, world_size)
        self._old = self._weights()

    def step(self) -> list[float]:
        """Take one optimiser step of every expert; at the start of a round the images of all are waited for.

        Raises TrainingError where no images will come, or where those of an expert teach nothing.
        """
        number = self.rounds[0].at(self.steps_done).number
        if self._loaded != number:
            self._begin()
            self._loaded = number
        losses = super().step()
        for rounds, curve in zip(self.rounds, self.curves, strict=True):
            rounds.note(curve)
        if self.rounds[0].ends_round(self.steps_done):
            share = self.rounds[0].nft.share_after(number)
            self._old = [torch.lerp(old, new, 1 - share) for old, new in zip(self._old, self._weights(), strict=True)]
        return losses

    def save(self, directory: str) -> None:
        """Write a checkpoint; the examples of rounds that the checkpoint before it holds are given up."""
        super().save(directory)
        for rounds in self.rounds:
            rounds.saved(self.steps_done)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote."""
        super().load(directory)
        for rounds in self.rounds:
            rounds.restored(self.steps_done)

    def export(self, seconds: float) -> None:
        """Write every expert's adapter, then give up all examples: until then all experts need theirs to go on from a checkpoint."""
        super().export(seconds)
        for rounds in self.rounds:
            rounds.ended()

    def _begin(self) -> None:
        with self._adapters.using(self._old):
            for k, rounds in enumerate(self.rounds):
                rounds.publish(rounds.at(self.steps_done), partial(self._write_adapter, k))
        for rounds in self.rounds:
            rounds.open(rounds.at(self.steps_done))

    def _open_examples(self, job: ExpertJob) -> Any:
        return ()  # until the first round's are drawn

    def _examples_seen(self, k: int) -> int:
        nft = self.rounds[k].nft
        return nft.rounds * nft.prompts_per_round * nft.images_per_prompt

    def _figures(self, places: range) -> dict[str, torch.Tensor]:
        step, first = self.steps_done, self.rounds[0]
        batches, generators = [], []
        for rounds, seed in zip(self.rounds, self._seeds, strict=True):
            examples = rounds.examples
            assert examples is not None
            positions = batch_positions(
                len(examples), self.config.batch_size, step % rounds.steps_per_round, seed_of(seed, round=rounds.at(step).number)
            )  # fmt: skip
            batches.append(examples.batch([positions[place] for place in places]))
            generators += example_generators(step, places, seed)
        together = {name: tensor.to(self._device) for name, tensor in stacked(batches).items()}
        rewards = together.pop(REWARDS)
        noised = self._family.noised(together, generators, self._loss)
        denoiser = self._adapters.denoiser
        with torch.no_grad(), self._adapters.using(self._old):
            old_NChw = self._family.predict(denoiser, noised)
        losses = nft_loss(
            self._family.predict(denoiser, noised),
            old_NChw,
            noised.target,
            rewards,
            first.nft.beta,
            noised.clean_scale if first.nft.normalised else None,
        )
        return {"loss": losses.unflatten(0, (len(self.jobs), -1)).mean(1)}

    def _weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._adapters.parameters()]

    def _further_tensors(self) -> dict[str, torch.Tensor]:
        return {f"{_OLD}{index}": old.cpu().clone() for index, old in enumerate(self._old)}

    def _restore_further(self, tensors: dict[str, torch.Tensor]) -> None:
        self._old = [tensors[f"{_OLD}{index}"].to(self._device) for index in range(len(self._old))]
