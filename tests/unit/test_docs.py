"""What the documentation says can be done: its commands are run where they cost nothing and parsed where they do, its recipes are valid."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from selma_ray.cli import commands as cli
from selma_ray.cli.commands import build_parser
from selma_ray.cli.explain import keys_by_section
from selma_ray.config import apply_overrides, validate
from selma_ray.run.recipe import Recipe, load_recipe
from selma_ray.skills import Skill
from selma_ray.yaml_values import read_mapping

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
# Those that read no run and start nothing.
_FREE = ("explain", "recipes", "init", "skills", "plan")
_STUDIES = ("miniature_study", "miniature_more", "beyond")
_KEYS = {key for _, rows in keys_by_section() for key, *_ in rows}
_SECTIONS = {key.partition(".")[0] for key in _KEYS if "." in key}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found in _BLOCK.finditer(page.read_text()):
            if found["language"] == language:
                yield page.relative_to(ROOT).as_posix(), found["text"]


def selma_commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["selma"]]


@pytest.mark.parametrize(("page", "text"), list(blocks("bash")))
def test_commands_of_a_block_are_understood_and_run_where_they_are_free(
    page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in selma_commands(text):
        options, rest = build_parser().parse_known_args(words)
        assert not [word for word in rest if "=" not in word], words
        if options.command in _FREE:
            assert cli.main(words) == 0, capsys.readouterr().err
        elif hasattr(options, "recipe") and options.recipe not in _STUDIES:
            path = Path(options.recipe)
            if path.suffix and path.parent == Path() and not path.exists():  # an earlier block of the page made it
                assert cli.main(["init", path.stem]) == 0
            recipe = options.recipe if path.parent == Path() else str(ROOT / path)
            load_recipe(recipe, [*options.overrides, *rest])


@pytest.mark.parametrize(("page", "text"), list(blocks("yaml")))
def test_yaml_is_a_part_of_a_recipe_or_a_skill(page: str, text: str) -> None:
    mapping = read_mapping(text)
    if "seeds" in mapping:
        validate(Skill, mapping, page)
        return
    whole = {"run_dir": "runs/x", "skills": ["coco"]}
    if "images" in mapping and "selection" in mapping["images"]:
        mapping["images"].setdefault("per_prompt", 2)
    validate(Recipe, apply_overrides(whole | mapping, [], Recipe), page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_keys_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", page.read_text()))
    keys = {name for name in named if name.partition(".")[0] in _SECTIONS}
    # Dictionaries have names of their own below: serving.adapters.NAME.
    unknown = {key for key in keys if key not in _KEYS and not any(key.startswith(f"{each}.") for each in _KEYS)}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [page.relative_to(ROOT / "docs") for page in PAGES[:] if page.is_relative_to(ROOT / "docs")]
    assert [str(page) for page in missing if f": {page}" not in navigation] == []
