import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.errors import JudgeError
from selma_ray.evaluation.dsg import SCORERS, Answered, dpg, mean_score, official, overall_score, selma
from selma_ray.evaluation.dsg1k import parse_parents, read_answers, read_parents

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def released(shared_eval):
    parents = read_parents(shared_eval / "dsg" / "dsg-1k-anns.csv")
    return read_answers(shared_eval / "dsg" / "mplug_dsg.csv", parents), parents


def test_official_reproduces_every_score_of_the_reference(shared_eval, released):
    answers, parents = released
    reference = json.loads((shared_eval / "dsg" / "dsg_reference_scores_mplug.json").read_text())
    compared = 0
    for key, items in reference["per_item"].items():
        answers_of_model = answers[key.removeprefix("mplug-large|")]
        for item, (with_dependency, without_dependency, num_answered) in items.items():
            # The release has no answer for tifa160_134; the reference counts it as one question that is not answered yes.
            questions = answers_of_model.get(item) or [Answered(1, "")]
            assert item in parents
            assert len(questions) == num_answered
            assert abs(mean_score(official(questions)) - with_dependency) < TOLERANCE, item
            without_parents = [Answered(each.id, each.answer) for each in questions]
            assert abs(mean_score(official(without_parents)) - without_dependency) < TOLERANCE, item
            compared += 1
    assert compared == 1060 + 4 * 160


def test_official_reproduces_the_reference_averages(shared_eval, released):
    answers, _ = released
    summary = json.loads((shared_eval / "dsg" / "dsg_reference_scores_mplug.json").read_text())["summary"]
    for key, splits in summary.items():
        items = dict(answers[key.removeprefix("mplug-large|")])
        items.setdefault("tifa160_134", [Answered(1, "")])
        count, mean = splits["all"]
        assert len(items) == count
        assert abs(overall_score("official", [official(questions) for questions in items.values()]) - mean) < TOLERANCE


def test_dpg_reproduces_its_oracle(shared_eval, released):
    answers, _ = released
    oracle = json.loads((shared_eval / "oracles" / "dpg_mode_on_dsg1k_mplug.json").read_text())
    for item, score in oracle["per_item"].items():
        assert abs(mean_score(dpg(answers["sd2dot1"][item])) - score) < TOLERANCE, item
    scores = [mean_score(dpg(answers["sd2dot1"][item])) for item in oracle["per_item"]]
    assert abs(mean_score(scores) - oracle["mean"]) < TOLERANCE


CHAIN = [Answered(1, "no", (0,)), Answered(2, "yes", (1,)), Answered(3, "yes", (2,))]


def test_official_looks_at_direct_parents_only_and_dpg_cascades():
    assert official(CHAIN) == [0.0, 0.0, 1.0]
    assert dpg(CHAIN) == [0.0, 0.0, 0.0]
    assert dpg(CHAIN[::-1]) == [1.0, 0.0, 0.0]  # question 3 was seen before its parent fell


def test_a_missing_parent_is_an_error_but_for_selma():
    orphan = [Answered(1, "yes", (7,))]
    assert selma(orphan) == [1.0]
    for scorer in (official, dpg):
        with pytest.raises(JudgeError, match="depends on question 7"):
            scorer(orphan)


def test_only_the_exact_word_yes_counts():
    answers = ["yes", "Yes", "yes 1000", "no bus", "nan", ""]
    assert official([Answered(index, text) for index, text in enumerate(answers, start=1)]) == [1.0, 0, 0, 0, 0, 0]


def test_selma_averages_over_questions_and_the_others_over_prompts():
    scores = [[1.0], [0.0, 0.0, 0.0]]
    assert overall_score("official", scores) == overall_score("dpg", scores) == 0.5
    assert overall_score("selma", scores) == 0.25


def test_parents_are_read_as_each_release_reads_them():
    assert parse_parents("1, 2") == (1, 2)
    assert parse_parents("1, 2", strip=False) == (1,)
    with pytest.raises(ValueError, match="right"):
        parse_parents("5, right")


@st.composite
def acyclic(draw):
    count = draw(st.integers(1, 8))
    answers = draw(st.lists(st.sampled_from(["yes", "no", None]), min_size=count, max_size=count))
    parents = [draw(st.lists(st.integers(0, index), max_size=2, unique=True)) for index in range(count)]
    return [Answered(index + 1, answers[index], parents[index]) for index in range(count)]


@given(acyclic())
def test_unreadable_answers_are_null_and_never_zero(questions):
    for scorer in SCORERS.values():
        for question, score in zip(questions, scorer(questions), strict=True):
            assert (score is None) == (question.answer is None)


@given(acyclic())
def test_a_cascade_never_scores_higher_and_without_parents_all_agree(questions):
    for cascaded, direct in zip(dpg(questions), official(questions), strict=True):
        assert (cascaded or 0.0) <= (direct or 0.0)
    flat = [Answered(each.id, each.answer) for each in questions]
    assert official(flat) == dpg(flat) == selma(flat)
