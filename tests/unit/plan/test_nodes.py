"""The groups of nodes that a recipe can use."""

from pathlib import Path

import pytest

from selma_ray.cli import commands as cli
from selma_ray.plan.nodes import node_groups
from selma_ray.run.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def test_the_miniature_takes_one_small_node_a_role_and_no_gpu() -> None:
    groups = {group.role: group for group in node_groups(recipe("demo"))}
    assert list(groups) == ["llm", "render", "train", "serve"]
    assert all((group.gpus, group.card_bytes, group.fewest) == (0, None, 1) for group in groups.values())
    assert groups["train"].most == 5  # an expert for each skill


@pytest.mark.parametrize(
    ("role", "overrides", "expected"),
    [
        ("llm", [], (1, 1, 1, 4)),
        ("llm", ["prompts.llm.tensor_parallel_size=2", "prompts.llm.num_cpus=3"], (6, 2, 1, 4)),
        ("train", ["experts.workers_per_expert=4", "experts.max_concurrent=2"], (1, 1, 4, 8)),
        ("train", ["experts.max_concurrent=9"], (1, 1, 1, 5)),
        # Two of the five renderers share a GPU; the evaluation's four have a judge in their process, which takes a whole one.
        ("render", ["images.num_gpus=0.5", "evaluation.num_gpus=0.5", "images.max_renderers=5"], (2, 1, 1, 4)),
        # Half a GPU for a generator, half for the evaluator: all of them stay.
        ("serve", ["serving.generator_replicas=2", "serving.max_generator_replicas=6"], (1, 1, 2, 4)),
    ],
)
def test_a_group_is_as_large_as_its_processes_make_it(
    role: str, overrides: list[str], expected: tuple[int, int, int, int]
) -> None:
    (group,) = [group for group in node_groups(recipe("sdxl", *overrides)) if group.role == role]
    assert (group.cpus, group.gpus, group.fewest, group.most) == expected


def test_cards_are_as_large_as_the_largest_process_of_their_role() -> None:
    flux = {group.role: group.card_bytes for group in node_groups(recipe("flux"))}
    assert 60e9 < flux["render"] < 70e9  # 57 GB of weights in bf16
    assert flux["llm"] < flux["train"] < flux["render"]


def test_the_plan_lists_them_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(RECIPES / "sdxl.yaml"), "--cluster"]) == 0
    shown = capsys.readouterr().out
    assert "role=GROUP" in shown
    assert "1 to 8" in shown
    assert cli.main(["plan", str(RECIPES / "sdxl.yaml")]) == 0
    assert "role=GROUP" not in capsys.readouterr().out
