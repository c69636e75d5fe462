"""Which LoRAs a recipe asks for: one expert per skill, and what is fitted to all skills' data together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selma_ray.experts.config import ExpertsConfig

__all__ = ["MIXED_PREFIX", "MIXTURE", "PlannedExpert", "plan_experts"]

MIXED_PREFIX, MIXTURE = "mixed-r", "moe"


@dataclass(frozen=True)
class PlannedExpert:
    """A LoRA to fit: its name, the skills whose images it learns from, and its settings.

    `experts` are the finished experts that a mixture weighs; none for a LoRA of its own.
    """

    name: str
    skills: tuple[str, ...]
    config: ExpertsConfig
    experts: tuple[str, ...] = ()


def plan_experts(skills: Sequence[str], config: ExpertsConfig) -> list[PlannedExpert]:
    """Return an expert for each skill, then the baselines on the mixed data that the recipe asks for (SELMA, section 5.2).

    Those are a LoRA for each rank of experts.mixed, and a mixture of the experts. With experts.nft the steps follow from the rounds.
    """
    if config.nft:
        config = config.model_copy(update={"steps": config.nft.steps(config.batch_size)})
    planned = [PlannedExpert(skill, (skill,), config) for skill in skills]
    if config.mixed:
        scale = config.lora.alpha / config.lora.rank
        for rank in config.mixed.ranks:
            lora = config.lora.model_copy(update={"rank": rank, "alpha": scale * rank})
            changes: dict[str, Any] = {"lora": lora, **_length_of_mixed(config, len(skills))}
            planned.append(PlannedExpert(f"{MIXED_PREFIX}{rank}", tuple(skills), config.model_copy(update=changes)))
    if config.moe:
        changes = {"learning_rate": config.moe.learning_rate, "steps": config.moe.steps or config.steps}
        planned.append(PlannedExpert(MIXTURE, tuple(skills), config.model_copy(update=changes), tuple(skills)))
    return planned


def _length_of_mixed(config: ExpertsConfig, num_skills: int) -> dict[str, Any]:
    """Return how long a mixed LoRA is fitted; in rounds to as many images as all experts together draw."""
    assert config.mixed is not None
    if config.nft is None:
        return {"steps": config.mixed.steps or config.steps}
    nft = config.nft.model_copy(update={"rounds": num_skills * config.nft.rounds})
    return {"nft": nft, "steps": nft.steps(config.batch_size)}
