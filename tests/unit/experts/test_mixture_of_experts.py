import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.experts.config import ExpertsConfig, MoeConfig
from selma_ray.experts.plan import plan_experts
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, adapter, assert_same_bits, encoded_job, fit

CONFIG = BASE.model_copy(update={"steps": 3, "warmup_steps": 0, "schedule": "constant", "learning_rate": 5e-2})


@pytest.fixture(scope="module")
def make_job(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory, process_group: Any) -> Any:
    """Two fitted experts, and a function that makes the job of their mixture."""
    folder, model = RunFolder(str(tmp_path_factory.mktemp("run"))), ModelConfig(name=str(tiny_pipeline_dir))
    experts = tuple(encoded_job(folder, model, name, CONFIG) for name in ("counting", "style"))
    for job in experts:
        fit(job)

    def make(**changes: Any) -> Any:
        return dataclasses.replace(
            encoded_job(folder, model, "moe", CONFIG.model_copy(update=changes)), experts=experts
        )

    return make


def test_routers_are_fitted_and_experts_are_left_as_they_are(make_job: Any) -> None:
    job = make_job()
    fit(job)
    weights = adapter(job)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if name.endswith("router_KI"))
    for name, tensor in load_file(job.folder.local_path("experts", "style", "adapter_model.safetensors")).items():
        both = weights[name]
        assert torch.equal(both[4:] if "lora_A" in name else both[:, 4:], tensor)
    config = job.folder.read_json(job.directory, "adapter_config.json")
    assert (config["peft_type"], config["experts"], config["ranks"]) == ("MOE_LORA", ["counting", "style"], [4, 4])


def test_a_resumed_mixture_gives_the_bits_of_one_that_was_not_stopped(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    fit(job)
    weights = adapter(job)
    fit(job, stop_at=2, save_to=str(tmp_path))
    fit(job, start_from=str(tmp_path))
    assert_same_bits(adapter(job), weights)


@pytest.mark.parametrize("change", [{"zero_stage": 3}, {"gradient_checkpointing": True}])
def test_zero_and_recomputation_do_not_change_the_routers(make_job: Any, change: Any) -> None:
    job = make_job()
    fit(job)
    weights = adapter(job)
    other = make_job(**change)
    fit(other)
    for name, tensor in adapter(other).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


def test_a_mixture_s_key_changes_with_its_experts(make_job: Any) -> None:
    job = make_job()
    other = dataclasses.replace(job.experts[0], seed=1)
    assert dataclasses.replace(job, experts=(other, job.experts[1])).key != job.key
    assert dataclasses.replace(job, experts=()).key != job.key


def test_the_recipe_s_mixture_learns_from_all_skills_by_its_own_settings() -> None:
    config = ExpertsConfig(steps=100, moe=MoeConfig(steps=7))
    *experts, mixture = plan_experts(["counting", "style"], config)
    assert [each.experts for each in experts] == [(), ()]
    assert (mixture.name, mixture.skills, mixture.experts) == ("moe", ("counting", "style"), ("counting", "style"))
    assert (mixture.config.steps, mixture.config.learning_rate) == (7, 1e-5)


def test_a_mixture_of_experts_fitted_to_preferences_is_refused() -> None:
    with pytest.raises(ConfigError, match="moe is fitted by denoising alone and must be left out with dpo"):
        validate(ExpertsConfig, {"dpo": {}, "moe": {}}, "recipe.yaml")
