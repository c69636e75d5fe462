from typing import Any

import pytest

from selma_ray.adapters.config import LoraSettings
from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.experts.config import ExpertsConfig, MixedConfig
from selma_ray.experts.plan import plan_experts

CONFIG = ExpertsConfig(lora=LoraSettings(rank=16, alpha=8), steps=100)


def test_every_skill_has_an_expert() -> None:
    planned = plan_experts(["counting", "style"], CONFIG)
    assert [(expert.name, expert.skills, expert.config) for expert in planned] == [
        ("counting", ("counting",), CONFIG),
        ("style", ("style",), CONFIG),
    ]


def test_mixed_loras_learn_from_all_skills_at_their_own_rank_and_the_same_scale() -> None:
    config = CONFIG.model_copy(update={"mixed": MixedConfig(ranks=(16, 80), steps=500)})
    mixed = plan_experts(["counting", "style"], config)[2:]
    assert [(expert.name, expert.skills) for expert in mixed] == [
        ("mixed-r16", ("counting", "style")),
        ("mixed-r80", ("counting", "style")),
    ]
    assert [(each.config.lora.rank, each.config.lora.alpha, each.config.steps) for each in mixed] == [
        (16, 8, 500),
        (80, 40, 500),
    ]


@pytest.mark.parametrize("ranks", [[], [0], [4, 4]])
def test_bad_ranks_are_refused(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"mixed\.ranks"):
        validate(ExpertsConfig, {"mixed": {"ranks": ranks}}, "recipe.yaml")
