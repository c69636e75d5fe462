import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import SkillError
from selma_ray.miniature.captions import caption_grammar, parse_caption
from selma_ray.miniature.skills import SKILLS as MINIATURE
from selma_ray.miniature.skills import is_test_caption
from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.skills import load_skill, load_skills, packaged_skills

SELMA = {"coco": 30, "localized_narratives": 50, "countbench": 30, "whoops": 30, "diffusiondb": 50}


def test_selmas_five_skills_have_the_papers_word_caps_and_three_seeds() -> None:
    skills = {name: load_skill(name) for name in SELMA}
    assert {name: skill.max_words for name, skill in skills.items()} == SELMA
    assert all(len(skill.seeds) == 3 and skill.rules for skill in skills.values())


@pytest.mark.parametrize("name", packaged_skills())
def test_seeds_are_diverse_by_the_rule_for_prompts(name: Any) -> None:
    diversity = DiversityFilter(0.8)
    for seed in load_skill(name).seeds:
        assert diversity.match(seed) is None
        diversity.add(seed)


def test_unknown_skill_lists_the_packaged_ones() -> None:
    with pytest.raises(SkillError, match=r"'cocoa' is neither packaged \(.*coco.*\) nor a file"):
        load_skill("cocoa")


def test_skill_files_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndescription: x\nmax_words: 3\nseeds: [one two three]\n")
    assert load_skill(str(path)).seeds == ("one two three",)
    with pytest.raises(SkillError, match="two skill files bear the name 'mine'"):
        load_skills([str(path), str(path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: mine\ndescription: x\nmax_words: 3\nseeds: []\n", "seeds "),
        ("name: merged\ndescription: x\nmax_words: 3\nseeds: [one two]\n", "name must not be one of base, merged"),
        (
            "name: mine\ndescription: x\nmax_words: 2\nseeds: [one two three]\n",
            "at most max_words=2 words, has 3; shorten",
        ),
        (
            "name: mine\ndescription: x\nmax_words: 2\nseed: [one]\nseeds: [one]\n",
            "seed is not a known key; did you mean 'seeds'",
        ),
    ],
)
def test_faulty_skill_files_say_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SkillError, match=message) as caught:
        load_skill(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../escaped",
        "Base",
        "base",
        "merged",
        "a/b",
        "a.b",
        "",
        "a b",
        "a\n",
        "1a",
        "_a",
        "кот",
        "a" * 65,
        "..",
        "a\\b",
    ],
)
def test_a_name_is_the_whole_name_of_a_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"name": name, "description": "x", "max_words": 3, "seeds": ["one two"]}))
    with pytest.raises(SkillError, match=r"mine\.yaml: name ") as caught:
        load_skill(str(path))
    assert "\n" not in str(caught.value)


def test_words_of_seeds_are_counted_in_any_script(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndescription: x\nmax_words: 7\nseeds: [一只猫坐在垫子上]\n", encoding="utf-8")
    with pytest.raises(SkillError, match="at most max_words=7 words, has 8"):
        load_skill(str(path))


@pytest.mark.parametrize("name", MINIATURE)
def test_the_miniatures_skill_files_carry_its_grammars(name: Any) -> None:
    """A changed grammar is copied into the file: its text stands, indented, under the key `grammar`."""
    skill = load_skill(f"miniature/{name}")
    assert skill.name == name
    assert skill.grammar == caption_grammar(name)


@pytest.mark.parametrize("name", MINIATURE)
def test_the_miniatures_seeds_are_captions_of_its_grammar_and_not_of_its_test_set(name: Any) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.testing import _is_grammar_accept_string

    skill = load_skill(f"miniature/{name}")
    grammar = xgrammar.Grammar.from_ebnf(f"root ::= caption\n{skill.grammar}")
    for seed in skill.seeds:
        assert _is_grammar_accept_string(grammar, seed)
        assert parse_caption(seed).groups
        assert not is_test_caption(seed)
