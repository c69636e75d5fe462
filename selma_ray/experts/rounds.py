"""Rounds of an expert that learns from images its own adapter draws: what each round draws, and where it lies.

experts/<name>/rounds-<key>/0001/adapter/            the adapter that draws the round's images; there before anything of the round is
                                /images/<k>.parquet  images of some of its prompts with their scores, written whole
                                /examples/<k>.safetensors   the latents they were decoded from, until a checkpoint no longer needs them
                                /round.json          what the round taught: scores, groups without spread
                                /../stopped.json     why drawing ended, for whoever waits for images
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selma_ray.adapters.files import is_adapter
from selma_ray.config import identity
from selma_ray.errors import TrainingError
from selma_ray.models.config import SamplingConfig
from selma_ray.order import batch_positions
from selma_ray.records import content_id, seed_of
from selma_ray.storage import RunFolder

__all__ = ["DrawnData", "DrawnPrompt", "Round", "RoundsPlan", "RoundsSource", "summary_of"]

_STOPPED = "stopped.json"
_FORMAT = 2  # of what is drawn: 1 had the latents of decoded images, encoded again


@dataclass(frozen=True)
class DrawnData:
    """What an expert's images are drawn from, and how; the model is the run's."""

    prompts: tuple[tuple[str, str], ...]
    """(skill, prompt) in a fixed order."""
    sampling: SamplingConfig
    model_identity: str
    judge_identity: str

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the images and their scores, as plain values."""
        return {
            "format": _FORMAT,
            "prompts": [list(pair) for pair in self.prompts],
            "sampling": identity(self.sampling),
            "model": self.model_identity,
            "judge": self.judge_identity,
        }


@dataclass(frozen=True)
class RoundsSource:
    """What a run has for the rounds of all its experts: prompts, how they are drawn, and what scores the images."""

    prompts: Mapping[str, Sequence[str]]
    """Training prompts by skill, in a fixed order."""
    sampling: SamplingConfig
    model_identity: str
    judge_identity: str
    open_scorer: Callable[[], Callable[[Sequence[Any], Sequence[str]], list[float | None]]]
    """Loads what scores images by their prompts, in the process that draws them."""

    def data(self, skills: Sequence[str]) -> DrawnData:
        """Return what an expert of these skills draws from; raises TrainingError for a skill without training prompts."""
        for skill in skills:
            if not self.prompts[skill]:
                raise TrainingError(f"skill {skill} has no training prompt to draw; run `selma generate` first")
        prompts = tuple((skill, prompt) for skill in skills for prompt in self.prompts[skill])
        return DrawnData(prompts, self.sampling, self.model_identity, self.judge_identity)


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt of a round, and the seeds of its images."""

    skill: str
    prompt: str
    place: int
    """Its place in the round."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class RoundsPlan:
    """What an expert draws, round after round; pickles, for trainers and renderers. Rounds count from 1."""

    folder: RunFolder
    directory: str
    prompts: tuple[tuple[str, str], ...]
    """(skill, prompt) in a fixed order."""
    sampling: SamplingConfig
    rounds: int
    prompts_per_round: int
    images_per_prompt: int
    prompts_per_call: int
    seed: int

    def of(self, number: int) -> "Round":
        """Return a round by its number."""
        return Round(self, number)

    @property
    def chunks_per_round(self) -> int:
        """Return into how many calls of a renderer a round's prompts are divided."""
        return -(-self.prompts_per_round // self.prompts_per_call)

    def stop(self, reason: str) -> None:
        """Leave word that no more images will come."""
        self.folder.write_json({"reason": reason}, self.directory, _STOPPED)

    def restart(self) -> None:
        """Take that word back."""
        self.folder.delete(self.directory, _STOPPED)

    def stopped(self) -> str | None:
        """Return why no more images will come; None while they may."""
        if not self.folder.exists(self.directory, _STOPPED):
            return None
        return str(self.folder.read_json(self.directory, _STOPPED)["reason"])


@dataclass(frozen=True)
class Round:
    """One round of a plan."""

    plan: RoundsPlan
    number: int

    @property
    def directory(self) -> str:
        """Return the round's folder, relative to the run's."""
        return f"{self.plan.directory}/{self.number:04d}"

    @property
    def adapter(self) -> str:
        """Return the folder of the adapter that draws the round, relative to the run's."""
        return f"{self.directory}/adapter"

    def can_be_drawn(self) -> bool:
        """Tell whether the adapter is there."""
        return is_adapter(self.plan.folder, self.adapter)

    def images(self, chunk: int) -> str:
        """Return the place of a chunk's images, which are written last."""
        return f"{self.directory}/images/{chunk:04d}.parquet"

    def examples(self, chunk: int) -> str:
        """Return the place of a chunk's latents and conditioning."""
        return f"{self.directory}/examples/{chunk:04d}.safetensors"

    def is_drawn(self, chunk: int) -> bool:
        """Tell whether a chunk's images and examples are there."""
        return self.plan.folder.exists(self.images(chunk)) and self.plan.folder.exists(self.examples(chunk))

    def missing_chunks(self) -> list[int]:
        """Return the chunks whose images are not there, or whose examples no longer are while the round is not learnt from."""
        if self.is_learnt():
            return []
        return [chunk for chunk in range(self.plan.chunks_per_round) if not self.is_drawn(chunk)]

    def is_learnt(self) -> bool:
        """Tell whether the examples were given up, as a checkpoint holds what they taught."""
        return self.plan.folder.exists(self.directory, "learnt.json")

    def give_up_examples(self) -> None:
        """Delete the examples, as a checkpoint holds what they taught."""
        if not self.is_learnt():
            self.plan.folder.write_json({}, self.directory, "learnt.json")
            self.plan.folder.delete(self.directory, "examples")

    def prompts(self) -> list[DrawnPrompt]:
        """Return the round's prompts in order: each comes up as often as any other, in an order of its own every time."""
        plan = self.plan
        positions = batch_positions(
            len(plan.prompts), plan.prompts_per_round, self.number - 1, seed_of(plan.seed, rounds="prompts")
        )
        return [self._drawn(place, *plan.prompts[position]) for place, position in enumerate(positions)]

    def chunk(self, number: int) -> list[DrawnPrompt]:
        """Return the prompts of one chunk."""
        first = number * self.plan.prompts_per_call
        return self.prompts()[first : first + self.plan.prompts_per_call]

    def row_id(self, drawn: DrawnPrompt, index: int) -> str:
        """Return the id of an image: its content is decided by the plan's folder, which names all settings."""
        return content_id(
            rounds=self.plan.directory, round=self.number, prompt=drawn.prompt, seed=drawn.seeds[index], place=drawn.place
        )  # fmt: skip

    def write_summary(self, values: dict[str, Any]) -> None:
        """Keep what the round taught."""
        self.plan.folder.write_json(values, self.directory, "round.json")

    def _drawn(self, place: int, skill: str, prompt: str) -> DrawnPrompt:
        seeds = [
            seed_of(self.plan.seed, round=self.number, skill=skill, prompt=prompt, place=place, image_index=index)
            for index in range(self.plan.images_per_prompt)
        ]
        return DrawnPrompt(skill, prompt, place, tuple(seeds))


def summary_of(scores: Sequence[float], groups: int, equal: int) -> dict[str, Any]:
    """Return what is kept of a round: the mean score, how many groups it drew and how many of them had no spread."""
    return {"score": sum(scores) / max(1, len(scores)), "groups": groups, "equal_groups": equal, "images": len(scores)}
