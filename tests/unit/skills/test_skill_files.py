import pytest

from selma_ray.errors import SkillError
from selma_ray.prompts.diversity import rouge_l
from selma_ray.skills import load_skill, load_skills, packaged_skills

SELMA = {"coco": 30, "localized_narratives": 50, "countbench": 30, "whoops": 30, "diffusiondb": 50}


def test_selmas_five_skills_have_the_papers_word_caps_and_three_seeds():
    skills = {name: load_skill(name) for name in SELMA}
    assert {name: skill.max_words for name, skill in skills.items()} == SELMA
    assert all(len(skill.seeds) == 3 and skill.rules for skill in skills.values())


@pytest.mark.parametrize("name", packaged_skills())
def test_seeds_are_diverse_by_the_rule_for_prompts(name):
    seeds = load_skill(name).seeds
    scores = [rouge_l(first, second) for number, first in enumerate(seeds) for second in seeds[:number]]
    assert max(scores) <= 0.8


def test_unknown_skill_lists_the_packaged_ones():
    with pytest.raises(SkillError, match=r"'cocoa' is neither packaged \(.*coco.*\) nor a file"):
        load_skill("cocoa")


def test_skill_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndescription: x\nmax_words: 3\nseeds: [one two three]\n")
    assert load_skill(str(path)).seeds == ("one two three",)
    with pytest.raises(SkillError, match="two skill files bear the name 'mine'"):
        load_skills([str(path), str(path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: mine\ndescription: x\nmax_words: 3\nseeds: []\n", "seeds "),
        (
            "name: mine\ndescription: x\nmax_words: 2\nseeds: [one two three]\n",
            "at most max_words=2 words, has 3; shorten",
        ),
        ("name: mine\ndescription: x\nmax_word: 2\nseeds: [one]\n", "did you mean 'max_words'"),
    ],
)
def test_faulty_skill_files_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SkillError, match=message) as caught:
        load_skill(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
