import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.skills import load_skills
from selma_ray.study.study import is_study

RECIPES = [
    path for path in sorted((Path(__file__).parents[3] / "jobs" / "recipes").glob("*.yaml")) if not is_study(path)
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_and_its_skills_are_valid(path: Any) -> None:
    recipe = load_recipe(path)
    assert len(load_skills(recipe.skills)) == 5


def test_the_recipes_of_the_design_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "miniature", "sd14", "sd2", "sdxl", "sd35", "flux"}


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES[0], ["seed=7"])
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.seed == 7


def test_a_skill_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="skills must name each skill once"):
        load_recipe(RECIPES[0], ["skills=[coco, coco]"])


def test_every_field_is_documented() -> None:
    def undocumented(model: Any, prefix: str = "") -> Iterator[Any]:
        for name, field in model.model_fields.items():
            if not field.description:
                yield prefix + name
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{prefix}{name}.")

    assert list(undocumented(Recipe)) == []


def test_reading_a_recipe_loads_no_engine() -> None:
    code = f"""
import sys
from selma_ray.run.recipe import load_recipe
import selma_ray.cli
load_recipe({str(RECIPES[0])!r})
print(sorted({{"torch", "vllm", "diffusers", "deepspeed", "transformers"}} & set(sys.modules)))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("run_dir: a\nskills: [coco, whoops]\nexperts: {steps: 7, lora: {rank: 2}}\n")
    (tmp_path / "above.yaml").write_text("extends: below.yaml\nskills: [coco]\nexperts: {lora: {alpha: 3}}\n")
    recipe = load_recipe(tmp_path / "above.yaml", ["run_dir=b"])
    assert (recipe.run_dir, recipe.skills, recipe.experts.steps) == ("b", ("coco",), 7)
    assert (recipe.experts.lora.rank, recipe.experts.lora.alpha) == (2, 3)


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("above.yaml", "must not lead back to the file itself"),
        ("[a, b]", "must name one recipe file"),
        ("no.yaml", "does not exist"),
    ],
)
def test_a_recipe_that_cannot_be_extended_is_named(tmp_path: Path, extends: str, message: str) -> None:
    (tmp_path / "above.yaml").write_text(f"extends: {extends}\nrun_dir: a\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "above.yaml")
