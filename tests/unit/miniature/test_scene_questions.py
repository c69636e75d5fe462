import random
from itertools import chain
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.pretrain.dataset import blank_arrays, describe_scene
from selma_ray.miniature.pretrain.question_bank import CATEGORIES, QuestionBank
from selma_ray.miniature.questions import questions_for
from selma_ray.miniature.skills import SKILLS, is_test_caption, sample_caption, sample_scene


@given(st.integers(0, 2**32), st.sampled_from(SKILLS))
def test_parents_are_asked_before_their_children(seed: int, skill: Any) -> None:
    questions = questions_for(sample_caption(skill, random.Random(seed)))
    assert [question.id for question in questions] == list(range(1, len(questions) + 1))
    for question in questions:
        assert all(0 <= parent < question.id for parent in question.parents)
        assert question.question.endswith("?")
        if question.category in ("color", "count", "spatial"):
            assert all(questions[parent - 1].category == "whole" for parent in question.parents)


def test_only_what_is_stated_is_asked() -> None:
    assert [q.question for q in questions_for("a banana")] == ["Is there a banana?"]
    assert [q.question for q in questions_for("A pencil sketch of two blue bananas left of an apple on a beach.")] == [
        "Are there bananas?",
        "Is there an apple?",
        "Are the bananas blue?",
        "Are there exactly two bananas?",
        "Are the bananas to the left of the apple?",
        "Is there a beach in the background?",
        "Is the picture a pencil sketch?",
    ]


def test_held_out_captions_are_fixed_different_and_for_tests_only() -> None:
    captions = [caption for of_skill in heldout_by_skill().values() for caption in of_skill]
    assert len(captions) == len(set(captions)) == 500
    assert list(heldout_by_skill()) == list(SKILLS)
    assert all(is_test_caption(caption) for caption in captions)
    assert captions[0] == "a fish"


def test_the_bank_knows_every_question_and_balances_its_answers() -> None:
    rng, bank = random.Random(0), QuestionBank()
    scenes = blank_arrays(40)
    for row in range(40):
        describe_scene(sample_scene(rng.choice(SKILLS), rng), scenes, row, rng)
    known = set(bank.texts)
    for caption in chain(*heldout_by_skill().values()):
        assert {question.question for question in questions_for(caption)} <= known
    for category in CATEGORIES:
        asked, answers = bank.draw(scenes, np.arange(40), 20, np.random.default_rng(0), category)
        assert asked.shape == (40, 20)
        if category not in ("how_many", "spatial"):
            assert 0.4 < (answers == 1).float().mean() < 0.6
