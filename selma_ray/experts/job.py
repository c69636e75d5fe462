"""What one expert's training depends on, and what comes out of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from selma_ray.adapters.files import is_adapter
from selma_ray.config import identity
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.rounds import DrawnData, RoundsPlan
from selma_ray.models.config import ModelConfig
from selma_ray.records import content_id, seed_of
from selma_ray.storage import RunFolder

__all__ = ["ExpertJob", "ExpertResult", "finished_result", "mean_of_tail"]

_FITTED_BESIDE = ("mixed", "moe")  # experts of their own, with keys of their own


@dataclass(frozen=True)
class ExpertJob:
    """One expert to fit: a name, the encoded examples it learns from, and all settings. Pickles, for the workers.

    `experts` are the jobs of the finished experts that a mixture weighs.
    """

    name: str
    folder: RunFolder
    caches: tuple[str, ...]
    cache_keys: tuple[str, ...]
    model: ModelConfig
    config: ExpertsConfig
    seed: int
    skills: tuple[str, ...] = ()
    experts: "tuple[ExpertJob, ...]" = ()
    drawn: DrawnData | None = None
    """What images are drawn from while it is fitted, for experts.nft."""

    @property
    def key(self) -> str:
        """Return a content id of all that decides the adapter's weights; another key's checkpoints are never restored."""
        settings = {name: each for name, each in identity(self.config).items() if name not in _FITTED_BESIDE}
        mixture = {"experts": [expert.key for expert in self.experts]} if self.experts else {}
        drawn = {"drawn": self.drawn.identity} if self.drawn else {}
        return content_id(
            name=self.name, caches=list(self.cache_keys), settings=settings, seed=self.seed, **mixture, **drawn
        )

    @cached_property
    def rounds(self) -> RoundsPlan | None:
        """Return the rounds in which its images are drawn; None where they are there before."""
        nft, drawn = self.config.nft, self.drawn
        if nft is None or drawn is None:
            return None
        return RoundsPlan(
            self.folder,
            f"{self.directory}/rounds-{self.key[:12]}",
            drawn.prompts,
            drawn.sampling,
            nft.rounds,
            nft.prompts_per_round,
            nft.images_per_prompt,
            nft.prompts_per_call,
            seed_of(self.seed, expert=self.name),
        )

    @property
    def directory(self) -> str:
        """Return the expert's folder, relative to the run's."""
        return f"experts/{self.name}"

    @property
    def candidates(self) -> str:
        """Return the folder of adapters to choose from, relative to the run's."""
        return f"{self.directory}/candidates-{self.key[:12]}"

    @property
    def candidate_steps(self) -> tuple[int, ...]:
        """Return the steps whose adapters are scored; none where the last one is kept without a choice."""
        steps, selection = self.config.steps, self.config.selection
        return (*range(selection.every_steps, steps, selection.every_steps), steps) if selection else ()

    def candidate(self, step: int) -> str:
        """Return the folder of the adapter of `step`, relative to the run's; its score stands beside it."""
        return f"{self.candidates}/step-{step:06d}"


@dataclass(frozen=True)
class ExpertResult:
    """A fitted expert: `loss` is the mean over the last tenth of its steps; `step` and `dev_dsg` are the chosen adapter's."""

    name: str
    key: str
    loss: float
    steps: int
    examples: int
    precision: str
    seconds: float
    step: int | None = None
    dev_dsg: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)


def finished_result(job: ExpertJob) -> ExpertResult | None:
    """Return the result of a job that is finished, or None; an adapter of other settings does not count."""
    if not (is_adapter(job.folder, job.directory) and job.folder.exists(job.directory, "result.json")):
        return None
    result = ExpertResult(**job.folder.read_json(job.directory, "result.json"))
    return result if result.key == job.key else None


def mean_of_tail(losses: Sequence[float]) -> float:
    """Return the mean of the last tenth of `losses`, at least one."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
