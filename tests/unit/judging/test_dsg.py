import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.errors import JudgeError
from selma_ray.judging.dsg import SCORERS, Answered, dpg, mean_score, official, overall_score, selma
from selma_ray.judging.dsg1k import complete, parse_parents, read_answers, read_parents

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def released(shared_eval: Path) -> Any:
    parents = read_parents(shared_eval / "dsg" / "dsg-1k-anns.csv")
    return read_answers(shared_eval / "dsg" / "mplug_dsg.csv", parents), parents


def test_official_reproduces_every_score_of_the_reference(shared_eval: Path, released: Any) -> None:
    answers, parents = released
    reference = json.loads((shared_eval / "dsg" / "dsg_reference_scores_mplug.json").read_text())
    compared = 0
    for key, items in reference["per_item"].items():
        # The release has no answer for tifa160_134; the reference counts it as one question that is not answered yes.
        answers_of_model = complete(answers[key.removeprefix("mplug-large|")], items)
        for item, (with_dependency, without_dependency, num_answered) in items.items():
            questions = answers_of_model[item]
            assert item in parents
            assert len(questions) == num_answered
            assert abs(mean_score(official(questions)) - with_dependency) < TOLERANCE, item
            without_parents = [Answered(each.id, each.answer) for each in questions]
            assert abs(mean_score(official(without_parents)) - without_dependency) < TOLERANCE, item
            compared += 1
    assert compared == 1060 + 4 * 160


def test_official_reproduces_the_reference_averages(shared_eval: Path, released: Any) -> None:
    answers, _ = released
    summary = json.loads((shared_eval / "dsg" / "dsg_reference_scores_mplug.json").read_text())["summary"]
    for key, splits in summary.items():
        answered = answers[key.removeprefix("mplug-large|")]
        items = complete(answered, [*answered, "tifa160_134"])
        count, mean = splits["all"]
        assert len(items) == count
        assert abs(overall_score("official", [official(questions) for questions in items.values()]) - mean) < TOLERANCE


def test_dpg_reproduces_its_oracle(shared_eval: Path, released: Any) -> None:
    answers, _ = released
    oracle = json.loads((shared_eval / "oracles" / "dpg_mode_on_dsg1k_mplug.json").read_text())
    for item, score in oracle["per_item"].items():
        assert abs(mean_score(dpg(answers["sd2dot1"][item])) - score) < TOLERANCE, item
    scores = [mean_score(dpg(answers["sd2dot1"][item])) for item in oracle["per_item"]]
    assert abs(mean_score(scores) - oracle["mean"]) < TOLERANCE


def test_selma_follows_its_release_on_every_released_answer(shared_eval: Path) -> None:
    """Against the rules written out once more: ids not stripped, cascade in file order, all questions weigh the same."""
    parents = read_parents(shared_eval / "dsg" / "dsg-1k-anns.csv", strip=False)
    for items in read_answers(shared_eval / "dsg" / "mplug_dsg.csv", parents).values():
        total, count = 0.0, 0
        for questions in items.values():
            held = {each.id: each.answer == "yes" for each in questions}
            for each in questions:
                held[each.id] &= all(held.get(parent, True) for parent in each.parents)
            total, count = total + sum(held.values()), count + len(held)
        assert (
            abs(overall_score("selma", [selma(questions) for questions in items.values()]) - total / count) < TOLERANCE
        )


def test_another_judges_file_in_another_order_with_other_dirt(shared_eval: Path, released: Any, tmp_path: Path) -> None:
    """The score of an item depends neither on the judge nor on the order of the file, and the last of two answers counts."""
    answers, parents = released
    path = tmp_path / "another_dsg.csv"
    items = list(answers["sd1dot5"].items())[:40]
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["answer", "item_id", "question_id", "t2i_model", "confidence"])
        for item, questions in items:
            rows.writerow(["NaN", item, questions[0].id, "mine", 0.5])
        for item, questions in reversed(items):
            rows.writerows([each.answer, item, f"{each.id}.0", "mine", 0.5] for each in reversed(questions))
    again = read_answers(path, parents)["mine"]
    for item, questions in items:
        assert mean_score(official(again[item])) == pytest.approx(mean_score(official(questions)), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,answer\na,yes\n", "lacks column t2i_model"),
        ("t2i_model,item_id,question_id,answer\n", "lacks rows"),
        ("t2i_model,item_id,question_id,answer\nm,unknown,1,yes\n", "line 2 answers item 'unknown'"),
        ("t2i_model,item_id,question_id,answer\nm,known,first,yes\n", "question_id must be a number, got 'first'"),
    ],
)
def test_bad_files_of_answers_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "answers.csv"
    path.write_text(text)
    with pytest.raises(JudgeError, match=message):
        read_answers(path, {"known": {1: ()}})


CHAIN = [Answered(1, "no", (0,)), Answered(2, "yes", (1,)), Answered(3, "yes", (2,))]


def test_official_looks_at_direct_parents_only_and_dpg_cascades() -> None:
    assert official(CHAIN) == [0.0, 0.0, 1.0]
    assert dpg(CHAIN) == [0.0, 0.0, 0.0]
    assert dpg(CHAIN[::-1]) == [1.0, 0.0, 0.0]  # question 3 was seen before its parent fell


def test_a_missing_parent_is_an_error_but_for_selma() -> None:
    orphan = [Answered(1, "yes", (7,))]
    assert selma(orphan) == [1.0]
    for scorer in (official, dpg):
        with pytest.raises(JudgeError, match="depends on question 7"):
            scorer(orphan)


def test_only_the_exact_word_yes_counts() -> None:
    answers = ["yes", "Yes", "yes 1000", "no bus", "nan", ""]
    assert official([Answered(index, text) for index, text in enumerate(answers, start=1)]) == [1.0, 0, 0, 0, 0, 0]


def test_selma_averages_over_questions_and_the_others_over_prompts() -> None:
    scores = [[1.0], [0.0, 0.0, 0.0]]
    assert overall_score("official", scores) == overall_score("dpg", scores) == 0.5
    assert overall_score("selma", scores) == 0.25


def test_parents_are_read_as_each_release_reads_them() -> None:
    assert parse_parents("1, 2") == (1, 2)
    assert parse_parents("1, 2", strip=False) == (1,)
    with pytest.raises(ValueError, match="right"):
        parse_parents("5, right")


@st.composite
def acyclic(draw: Any) -> Any:
    count = draw(st.integers(1, 8))
    answers = draw(st.lists(st.sampled_from(["yes", "no", None]), min_size=count, max_size=count))
    parents = [draw(st.lists(st.integers(0, index), max_size=2, unique=True)) for index in range(count)]
    return [Answered(index + 1, answers[index], parents[index]) for index in range(count)]


@given(acyclic())
def test_unreadable_answers_are_null_and_never_zero(questions: Any) -> None:
    for scorer in SCORERS.values():
        for question, score in zip(questions, scorer(questions), strict=True):
            assert (score is None) == (question.answer is None)


@given(acyclic())
def test_a_cascade_never_scores_higher_and_without_parents_all_agree(questions: Any) -> None:
    for cascaded, direct in zip(dpg(questions), official(questions), strict=True):
        assert (cascaded or 0.0) <= (direct or 0.0)
    flat = [Answered(each.id, each.answer) for each in questions]
    assert official(flat) == dpg(flat) == selma(flat)
