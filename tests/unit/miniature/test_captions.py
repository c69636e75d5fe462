import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.errors import CaptionError
from selma_ray.miniature.captions import MAX_WORDS, caption_grammar, parse_caption, parse_facts, write_caption
from selma_ray.miniature.pretrain.mixture import Looseness, loosen, sample_web_scene, write_web_caption
from selma_ray.miniature.scenes import BACKGROUNDS, RELATIONS, STYLES, Group, Scene
from selma_ray.miniature.skills import SKILLS, is_test_caption, sample_caption, sample_scene
from selma_ray.miniature.sprites import COLOURS, OBJECTS
from tests.unit.miniature.sentences import Sentences

SEEDS = st.integers(0, 2**32)


@st.composite
def scenes(draw: Any) -> Scene:
    names = draw(st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=2, unique=True))
    counts = [draw(st.integers(1, 4))] if len(names) == 1 else draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    groups = [Group(name, draw(st.sampled_from(list(COLOURS))), n) for name, n in zip(names, counts, strict=True)]
    relation = draw(st.sampled_from([None, *RELATIONS])) if len(groups) == 2 else None
    return Scene(tuple(groups), relation, draw(st.sampled_from(BACKGROUNDS)), draw(st.sampled_from(STYLES)))


@given(scenes(), SEEDS, st.booleans())
def test_a_caption_leads_back_to_its_scene(scene: Any, seed: Any, long: bool) -> None:
    caption = write_caption(scene, random.Random(seed), long=long)
    assert parse_caption(caption) == scene
    assert len(caption.split()) <= MAX_WORDS


@given(scenes(), SEEDS)
def test_case_stops_and_spaces_do_not_matter(scene: Any, seed: Any) -> None:
    caption = write_caption(scene, random.Random(seed))
    assert parse_caption(f"  {caption.upper()}. ") == parse_caption(caption.replace(" ", "   "))


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a zebra", "unknown word 'zebra'"),
        ("", "names no object"),
        ("a red", "expected 'OBJECT'"),
        ("apples", "needs a number"),
        ("an apple and an apple", "named twice"),
        ("three apples and two cars", "at most 4"),
        ("an apple and a car. There is also a boat", "at most two kinds"),
        ("an apple car", "noun noun"),
        ("a red apple. The apple is blue", "stated twice"),
        ("an apple on a beach, as a sketch. It is a watercolor", "stated twice"),
        ("an apple to the left of the apple", "itself"),
    ],
)
def test_a_caption_outside_the_grammar_says_why(caption: str, reason: str) -> None:
    with pytest.raises(CaptionError, match=reason) as caught:
        parse_caption(caption)
    assert "\n" not in str(caught.value)


def test_a_wrong_number_of_the_noun_is_forgiven() -> None:
    assert parse_caption("two apple") == parse_caption("two apples")
    assert parse_caption("a apples") == parse_caption("an apple")


@pytest.mark.parametrize("skill", SKILLS)
def test_every_sentence_of_a_grammar_is_a_caption(skill: Any) -> None:
    sentences, rng = Sentences(caption_grammar(skill)), random.Random(0)
    written = {sentences.write(rng) for _ in range(500)}
    assert len(written) > 250
    for sentence in written:
        parse_caption(sentence)
        assert len(sentence.split()) <= MAX_WORDS


@pytest.mark.parametrize("skill", SKILLS)
def test_xgrammar_reads_the_grammars(skill: Any) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    xgrammar.Grammar.from_ebnf(f"root ::= caption\n{caption_grammar(skill)}")


def test_an_unknown_skill_has_no_grammar() -> None:
    with pytest.raises(CaptionError, match="poetry"):
        caption_grammar("poetry")


@given(SEEDS)
def test_training_captions_are_no_test_captions(seed: Any) -> None:
    rng = random.Random(seed)
    scene, long = sample_web_scene(rng)
    caption = write_web_caption(scene, rng, long=long, looseness=Looseness(0.5, max_edits=3))
    assert not is_test_caption(caption)
    parse_caption(caption)


@given(SEEDS)
def test_a_loose_caption_states_something_else(seed: Any) -> None:
    rng = random.Random(seed)
    facts = parse_facts(sample_caption(rng.choice(SKILLS), rng))
    loose = loosen(facts, rng) if len(facts.groups) > 1 else facts
    assert loose != facts or len(facts.groups) == 1


@given(SEEDS, st.sampled_from(SKILLS))
def test_scenes_of_every_skill_can_be_described(seed: Any, skill: Any) -> None:
    rng = random.Random(seed)
    scene = sample_scene(skill, rng)
    assert parse_caption(write_caption(scene, rng, long=skill == "paragraphs")) == scene
