"""On-policy distillation: a student that starts at a merge is corrected by each skill's expert on the student's own states.

DiffusionOPD (2605.15055) and Flow-OPD (2605.08063): the student draws its own trajectories for the prompts of a skill; where it comes by,
that skill's expert says where it would go. Both transitions are the same linear function of the two predictions, so their squared distance
is that of the predictions times a weight of the step, which is taken as 1. One base is in memory, with an adapter for each expert and the
student's.

Shapes: N rows, M states, C latent channels, h x w latent pixels.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from selma_ray.adapters.mixing import ExpertLayers, LowRank
from selma_ray.adapters.peft_format import Adapter, LoraFactors
from selma_ray.adapters.student import Student
from selma_ray.errors import TrainingError
from selma_ray.merging.config import DistilConfig
from selma_ray.models.conditions import Condition, Conditions
from selma_ray.models.config import SamplingConfig
from selma_ray.models.drawing import Drawing
from selma_ray.models.family import Predictor
from selma_ray.models.row_drawing import predict_guided
from selma_ray.order import batch_positions
from selma_ray.records import seed_of

__all__ = ["Distiller", "States"]


@dataclass(frozen=True, eq=False)
class States:
    """Where the student came by for prompts of one skill: a drawing, and what the denoiser sees, for each of M states."""

    skill: str
    drawings: tuple[Drawing, ...]
    inputs: torch.Tensor
    """MChw."""
    timesteps: torch.Tensor
    """M."""


class Distiller:
    """Takes optimiser steps of the student; what a step does depends on the seed and its number alone."""

    def __init__(
        self,
        predictor: Predictor,
        experts: Mapping[str, Adapter],
        start: Iterable[LoraFactors],
        prompts: Mapping[str, Sequence[str]],
        sampling: SamplingConfig,
        config: DistilConfig,
        seed: int,
    ) -> None:
        self.student = Student(predictor.denoiser, start)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.losses: list[float] = []
        self._predictor = predictor
        self._prompts, self._sampling, self._config, self._seed = prompts, sampling, config, seed
        self._experts = ExpertLayers(predictor.denoiser, {name: _low_ranks(each) for name, each in experts.items()})

    def step(self) -> float:
        """Take one optimiser step on states of every skill; returns their mean squared distance from the experts."""
        states = self.states()
        targets = [self.targets(each) for each in states]
        self.optimizer.zero_grad()
        loss = sum(self.accumulate(each, target) for each, target in zip(states, targets, strict=True))
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._config.gradient_clip)
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(
                f"the student's loss must be finite, got {loss} at step {len(self.losses) + 1}; lower merging.distil.learning_rate"
            )
        self.optimizer.step()
        self.losses.append(float(loss))
        return float(loss)

    @torch.no_grad()
    def states(self) -> list[States]:
        """Let the student draw images of every skill's prompts, all in one batch; returns some of the states on the way, by skill."""
        rows = [(skill, drawing) for skill in self._prompts for drawing in self._drawings(skill)]
        seen = self._courses([drawing for _, drawing in rows])
        return [self._some_of(skill, rows, seen) for skill in self._prompts]

    def _courses(self, drawings: Sequence[Drawing]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what the denoiser sees at each denoising step of the student's drawing: inputs (NChw) and timesteps (N)."""
        courses = [self._predictor.start(drawing) for drawing in drawings]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with self.student.folded():
            while not courses[0].finished:
                inputs_NChw = torch.cat([course.model_input() for course in courses])
                timesteps_N = torch.stack([course.timestep for course in courses])
                seen.append((inputs_NChw.clone(), timesteps_N))
                predicted_NChw = self._predicted(inputs_NChw, timesteps_N, drawings)
                for course, predicted_1Chw in zip(courses, predicted_NChw.split(1), strict=True):
                    course.advance(predicted_1Chw)
        return seen

    def _some_of(
        self, skill: str, rows: Sequence[tuple[str, Drawing]], seen: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> States:
        own = [row for row, (drawn_for, _) in enumerate(rows) if drawn_for == skill]
        chosen = [(row, step) for place, row in enumerate(own) for step in self._chosen(skill, place, len(seen))]
        return States(
            skill,
            tuple(rows[row][1] for row, _ in chosen),
            torch.stack([seen[step][0][row] for row, step in chosen]),
            torch.stack([seen[step][1][row] for row, step in chosen]),
        )

    @torch.no_grad()
    def targets(self, states: States) -> list[tuple[float, torch.Tensor]]:
        """Return what the skill's expert would predict at its states (MChw), and with an anchor what the base would, with their weights."""
        config = self._config
        guidance_scale = config.teacher_guidance_scale
        taught = [
            drawing if guidance_scale is None else replace(drawing, guidance_scale=guidance_scale)
            for drawing in states.drawings
        ]
        targets = [(1.0, self._predicted(states.inputs, states.timesteps, taught, states.skill))]
        if config.anchor:
            targets.append((config.anchor, self._predicted(states.inputs, states.timesteps, states.drawings)))
        return targets

    def accumulate(self, states: States, targets: Sequence[tuple[float, torch.Tensor]]) -> float:
        """Add the gradient of a skill's share of the loss to the student's; returns that share."""
        with self.student.present():
            predicted_MChw = self._predicted(states.inputs, states.timesteps, states.drawings)
        distances = [
            weight * (predicted_MChw.float() - target_MChw.float()).square().mean() for weight, target_MChw in targets
        ]
        loss = torch.stack(distances).sum() / len(self._prompts)
        loss.backward()
        return float(loss.detach())

    def _predicted(
        self,
        inputs_NChw: torch.Tensor,
        timesteps_N: torch.Tensor,
        drawings: Sequence[Drawing],
        expert: str | None = None,
    ) -> torch.Tensor:
        """Return the guided prediction of each row (NChw), by an expert, by the student where it is present, else by the base."""
        rows_of_step = self._predictor.rows_of(drawings[0]) * len(drawings)
        self._experts.weigh([((expert, 1.0),) if expert else ()] * rows_of_step)
        return predict_guided(self._predictor, inputs_NChw, timesteps_N, drawings[0], self._encoded(drawings))

    def _encoded(self, drawings: Sequence[Drawing]) -> list[Conditions]:
        with torch.no_grad():
            encoded = self._predictor.encode(drawings)
        return [
            Conditions(_own(each.positive), None if each.negative is None else _own(each.negative)) for each in encoded
        ]

    def _drawings(self, skill: str) -> list[Drawing]:
        """Return the images of a skill in this step: its prompts in an order of their own every time they have all come up."""
        sampling, step, count = self._sampling, len(self.losses), self._config.prompts_per_skill
        prompts = self._prompts[skill]
        chosen = batch_positions(len(prompts), count, step, seed_of(self._seed, distil=skill))
        return [
            Drawing(
                prompts[position], seed_of(self._seed, distil=skill, step=step, place=place), sampling.steps,
                sampling.guidance_scale, sampling.width_px, sampling.height_px, sampling.negative_prompt,
            )
            for place, position in enumerate(chosen)
        ]  # fmt: skip

    def _chosen(self, skill: str, place: int, steps: int) -> list[int]:
        rng = random.Random(seed_of(self._seed, distil=skill, step=len(self.losses), states_of=place))
        return sorted(rng.sample(range(steps), min(steps, self._config.states_per_image)))


def _low_ranks(adapter: Adapter) -> dict[str, LowRank]:
    return {each.module: LowRank(each.A_RI, each.scale * each.B_OR) for each in adapter}


def _own(condition: Condition) -> dict[str, Any]:
    """Return tensors that gradients may be computed through: some encoders' are made for inference alone."""
    return {name: tensor.clone() for name, tensor in condition.items()}
