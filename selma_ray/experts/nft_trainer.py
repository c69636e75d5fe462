"""An expert's training in rounds, DiffusionNFT (2509.16117): publish the adapter that draws, wait for its images, learn from them.

Images are drawn elsewhere, by whoever follows the rounds' folders. The trainer knows no Ray.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from selma_ray.adapters.training import export_adapter, trainable_parameters
from selma_ray.errors import TrainingError
from selma_ray.experts.examples import example_generators
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.nft_loss import nft_loss
from selma_ray.experts.round_examples import REWARDS, RoundExamples
from selma_ray.experts.rounds import Round
from selma_ray.experts.trainer import ExpertTrainer
from selma_ray.models.family import Batch
from selma_ray.order import batch_positions
from selma_ray.records import seed_of

__all__ = ["NftTrainer"]

_POLL_S = 0.2  # four trainers of five wait at any time: more often they took a sixth of a core
_REMOTE_POLL_S = 1.0


class NftTrainer(ExpertTrainer):
    """Takes the optimiser steps of one round after another; the old adapter follows the trained one as `experts.nft` says."""

    def __init__(self, job: ExpertJob, rank: int = 0, world_size: int = 1) -> None:
        assert job.rounds is not None
        assert job.config.nft is not None
        self._plan, self._nft = job.rounds, job.config.nft
        self._per_round = self._nft.steps_per_round(job.config.batch_size)
        self._loaded: int | None = None
        super().__init__(job, rank, world_size)
        self._set_old(self._whole_weights())
        self._kept_by_checkpoint = 0

    def step(self) -> float:
        """Take one optimiser step; at the start of a round its images are waited for, at its end the old adapter follows.

        Raises TrainingError where no images will come, or where they teach nothing.
        """
        number = self._round.number
        if self._loaded != number:
            self._begin(self._round)
        loss = super().step()
        self.curve.score.append(self._examples.summary["score"])
        self.curve.equal_groups.append(self._examples.summary["equal_groups"] / self._examples.summary["groups"])
        if self.steps_done % self._per_round == 0:
            self._follow(self._nft.share_after(number))
        return loss

    def save(self, directory: str) -> None:
        """Write a checkpoint; the examples of rounds that the checkpoint before it holds are given up."""
        super().save(directory)
        if self._rank == 0:
            self._give_up_examples(self._kept_by_checkpoint)
        self._kept_by_checkpoint = self.steps_done // self._per_round

    def export(self, seconds: float) -> None:
        """Write the trained adapter, then give up all examples."""
        super().export(seconds)
        if self._rank == 0:
            self._give_up_examples(self._nft.rounds)

    @property
    def _round(self) -> Round:
        return self._plan.of(self.steps_done // self._per_round + 1)

    def _begin(self, round_: Round) -> None:
        if self._rank == 0 and not round_.can_be_drawn():
            self._publish(round_)
        self._wait_for_images(round_)
        self._examples = RoundExamples(round_, self.job.name, self._nft.spread_deviations)
        self._loaded = round_.number
        if self._rank == 0:
            round_.write_summary(self._examples.summary)

    def _publish(self, round_: Round) -> None:
        export_adapter(self._engine.module, self._old, self.job.folder, round_.adapter)

    def _wait_for_images(self, round_: Round) -> None:
        interval_s = _POLL_S if self.job.folder.is_local else _REMOTE_POLL_S
        missing = round_.missing_chunks()
        while missing:
            reason = self._plan.stopped()
            if reason is not None:
                raise TrainingError(f"images of expert {self.job.name} could not be drawn: {reason}")
            time.sleep(interval_s)
            missing = [chunk for chunk in missing if not round_.is_drawn(chunk)]

    def _give_up_examples(self, up_to: int) -> None:
        for number in range(up_to, 0, -1):
            if self._plan.of(number).is_learnt():
                return
            self._plan.of(number).give_up_examples()

    def _open_examples(self) -> Any:
        return ()  # until the first round's are drawn

    def _examples_seen(self) -> int:
        return self._nft.rounds * self._nft.prompts_per_round * self._nft.images_per_prompt

    def _positions(self) -> list[int]:
        seed = seed_of(self._seed, round=self._round.number)
        return batch_positions(len(self._examples), self.job.config.batch_size, self.steps_done % self._per_round, seed)

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
        self._kept_by_checkpoint = self.steps_done // self._per_round
