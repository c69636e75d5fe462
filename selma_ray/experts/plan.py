"""Which LoRAs a recipe asks for: one expert per skill, and the baselines on all skills' data together."""

from collections.abc import Sequence
from dataclasses import dataclass

from selma_ray.experts.config import ExpertsConfig

__all__ = ["PlannedExpert", "plan_experts"]


@dataclass(frozen=True)
class PlannedExpert:
    """A LoRA to fit: its name, the skills whose images it learns from, and its settings."""

    name: str
    skills: tuple[str, ...]
    config: ExpertsConfig


def plan_experts(skills: Sequence[str], config: ExpertsConfig) -> list[PlannedExpert]:
    """Return an expert for each skill, then a LoRA on the mixed data for each rank of experts.mixed (SELMA, section 5.2)."""
    planned = [PlannedExpert(skill, (skill,), config) for skill in skills]
    if config.mixed is None:
        return planned
    scale = config.lora.alpha / config.lora.rank
    for rank in config.mixed.ranks:
        lora = config.lora.model_copy(update={"rank": rank, "alpha": scale * rank})
        changes = {"lora": lora, "steps": config.mixed.steps or config.steps}
        planned.append(PlannedExpert(f"mixed-r{rank}", tuple(skills), config.model_copy(update=changes)))
    return planned
