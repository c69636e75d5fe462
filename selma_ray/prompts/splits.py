"""Which of a skill's kept prompts are its dev split, and how many are rendered for training: counted here and nowhere else."""

from selma_ray.prompts.config import PromptsConfig
from selma_ray.records import Split

__all__ = ["dev_count", "split_of", "train_count"]


def dev_count(config: PromptsConfig) -> int:
    """Return how many of a skill's kept prompts are its dev split: at least one where a share is asked for."""
    if config.dev_fraction == 0:
        return 0
    return min(max(1, round(config.per_skill * config.dev_fraction)), config.per_skill - 1)


def split_of(index: int, config: PromptsConfig) -> Split:
    """Return the split of the prompt kept as number `index`: dev prompts are evenly spaced."""
    count = dev_count(config)
    return "dev" if (index + 1) * count // config.per_skill > index * count // config.per_skill else "train"


def train_count(config: PromptsConfig) -> int:
    """Return how many of a skill's kept prompts are rendered for training."""
    return config.per_skill - dev_count(config)
