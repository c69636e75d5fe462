"""What stages take of a cluster, counted before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import ray

from selma_ray.errors import ConfigError
from selma_ray.run.demands import SERVE, check_stages_fit, stage_demands
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.run.stages import STAGES

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"
LARGE = [
    "sd14",
    "sd2",
    "sdxl",
    "sd35",
    "flux",
    "paper_sd14",
    "paper_sd2",
    "paper_sdxl",
    "workstation",
    "gpu_demo",
    "zimage",
    "sana",
    "flux2_klein",
    "qwen_image",
]


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def taken(recipe: Recipe, stage: str) -> dict[str, dict[str, float]]:
    return {demand.key: dict(demand.resources) for together, _ in stage_demands(recipe, stage) for demand in together}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes Ray believe in a machine of so many GPUs, and sixteen CPUs for each."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def make(gpus: int) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0 * max(1, gpus), "GPU": float(gpus)})

    return make


def test_a_process_that_does_two_things_takes_the_larger_share() -> None:
    evaluation = taken(load("sdxl", "evaluation.judge.num_gpus=0.25"), "evaluate")
    assert evaluation == {"evaluation.renderers": {"CPU": 1, "GPU": 1}}
    chosen = load("demo", "images.num_gpus=1", "images.selection.judge.num_cpus=2")
    assert taken(chosen, "generate")["images.min_renderers"] == {"CPU": 2, "GPU": 1}


def test_judges_of_their_own_and_writers_of_questions_are_parts_of_their_own() -> None:
    chosen = load("sdxl", "images.per_prompt=2", "images.selection.judge={name: owner/judge, num_gpus: 0.5}")
    parts = taken(chosen, "generate")
    assert parts["images.min_renderers"] == {"CPU": 1, "GPU": 1}
    assert parts["images.selection.judge"] == {"CPU": 1, "GPU": 0.5}
    assert parts["questions.writer.llm"] == {"CPU": 1, "GPU": 1}
    assert taken(load("sdxl", "merging.method=search"), "merge") == {
        "evaluation.num_cpus and evaluation.num_gpus": {"CPU": 1, "GPU": 1}
    }
    assert taken(load("sdxl"), "merge") == {}


@pytest.mark.parametrize("recipe", LARGE)
@pytest.mark.parametrize("gpus", [1, 8])
def test_every_recipe_fits_one_gpu_and_eight(machine: Any, recipe: Any, gpus: int) -> None:
    machine(gpus)
    check_stages_fit(load(recipe), [*STAGES, SERVE])


@pytest.mark.parametrize("recipe", LARGE)
def test_every_recipe_is_refused_in_one_line_without_a_gpu(machine: Any, recipe: Any) -> None:
    machine(0)
    with pytest.raises(ConfigError, match=r"must fit the local cluster's 0 GPU, needs 1; lower it$"):
        check_stages_fit(load(recipe), list(STAGES))


def test_what_evaluation_lacks_is_refused_before_training_is_paid_for(machine: Any) -> None:
    machine(1)
    with pytest.raises(
        ConfigError, match=r"evaluation\.renderers needs 1 and evaluation\.judges needs 1, .* they work at once"
    ):
        check_stages_fit(load("sdxl", "evaluation.judges=1"), list(STAGES))
    machine(2)
    check_stages_fit(load("sdxl", "evaluation.judges=1"), list(STAGES))
