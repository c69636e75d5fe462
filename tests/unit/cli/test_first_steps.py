"""What a person meets first: the published recipes by name, files to begin with, and what a skill file asks for."""

import json
from pathlib import Path

import pytest

from selma_ray.cli import commands as cli
from selma_ray.errors import ConfigError
from selma_ray.run.published import about, published_recipes, recipe_path
from selma_ray.run.recipe import load_recipe
from selma_ray.skills import load_skill

REPOSITORY = Path(__file__).parents[3]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_every_recipe_of_the_repository_is_published_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.stem for path in (REPOSITORY / "jobs" / "recipes").glob("*.yaml")}
    assert set(published_recipes()) == names
    listed = {row["name"]: row for row in json.loads(shown(capsys, "recipes", "--json"))}
    assert listed.keys() == names
    assert all(row["about"] for row in listed.values())
    assert (listed["demo"]["kind"], listed["miniature_study"]["kind"]) == ("recipe", "study")
    assert "Stable Diffusion 3.5 medium" in shown(capsys, "recipes")


def test_a_recipe_is_shown_as_it_stands_or_with_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "recipes", "sd2").strip() == published_recipes()["sd2"].read_text().strip()
    assert "rouge_l_threshold: 0.8" in shown(capsys, "recipes", "sd2", "--resolved")
    assert json.loads(shown(capsys, "recipes", "sd2", "--json"))["run_dir"] == "runs/sd2"
    assert "did you mean demo" in refused(capsys, "recipes", "demmo")


def test_a_published_name_is_a_recipe_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").run_dir == "runs/demo"
    (tmp_path / "mine.yaml").write_text("extends: demo\nrun_dir: runs/mine\n")
    assert load_recipe("mine.yaml").prompts == load_recipe("demo").prompts
    (tmp_path / "demo").write_text("extends: demo.yaml\nrun_dir: runs/other\n")
    assert load_recipe("demo").run_dir == "runs/other", "a file comes first"
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_recipe("nothing.yaml")
    assert recipe_path("s3://bucket/demo.yaml") == "s3://bucket/demo.yaml"


def test_about_ends_at_the_first_full_stop(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# What it is, in a line\n# and a half. More of it.\nseed: 0  # no\n")
    assert about(path) == "What it is, in a line and a half"


@pytest.mark.parametrize("extends", ["demo", "workstation", "zimage"])
def test_init_writes_files_that_are_taken_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extends: str
) -> None:
    shown(capsys, "init", "foxes", "--folder", str(tmp_path / "new"), "--extends", extends)
    recipe = load_recipe(tmp_path / "new" / "foxes.yaml")
    assert recipe.model == load_recipe(extends).model
    (skill,) = map(load_skill, recipe.skills)
    assert skill.name == "foxes"
    assert skill.sampling.temperature < 1  # the demo's own makes words of nothing outside its grammars
    told = shown(capsys, "skills", "check", recipe.skills[0])
    assert "A fox in a green coat" in told
    assert ("Grammar: compiles" in told) == (extends == "demo")  # a tiny model writes no sentence without one
    assert "is there already" in refused(capsys, "init", "foxes", "--folder", str(tmp_path / "new"))


@pytest.mark.parametrize("name", ["My Skill", "../up", "_x", "füchse"])
def test_a_name_that_no_skill_may_bear_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "must be small letters" in refused(capsys, "init", name, "--folder", str(tmp_path))
    for extends in ("nothing", "beyond"):  # the second is a study
        assert "published recipe" in refused(capsys, "init", "--folder", str(tmp_path), "--extends", extends)
    assert list(tmp_path.iterdir()) == []


def test_a_skill_is_checked_before_a_language_model_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, "skills", "check", "miniature/counting")
    assert "Grammar: compiles" in told
    assert "Write 20 new descriptions" in told
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ndescription: things\nmax_words: 9\nseeds: [two red cups, two red cups]\n")
    told = shown(capsys, "skills", "check", str(path))
    assert "more alike (ROUGE-L 1.00)" in told
    assert "shows 3 examples" in told
    path.write_text('name: a\ndescription: things\nmax_words: 9\nseeds: [two cups]\ngrammar: "caption := (("\n')
    assert "grammar must be EBNF" in refused(capsys, "skills", "check", str(path))
    assert "skill 'nothing' is neither packaged" in refused(capsys, "skills", "check", "nothing")
    assert "coco" in json.loads(shown(capsys, "skills", "list", "--json"))
