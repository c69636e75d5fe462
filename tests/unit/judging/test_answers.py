"""What an answer means, however it is written."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.judging.answers import choice_of, text_of
from selma_ray.judging.judges.interface import Answer
from selma_ray.judging.metrics import ANSWER_METRICS, metrics_of_answers
from selma_ray.judging.questions import Question
from selma_ray.judging.scoring import score_answers

COLOURS = ("Red", "dark blue", "2", "Zürich")


@given(
    st.sampled_from(COLOURS),
    st.sampled_from([str.lower, str.upper, str.title, str]),
    st.sampled_from(["{}", "{}.", " {}! ", '"{}"', "**{}**"]),
)
def test_a_choice_is_named_whatever_its_case_and_what_stands_around_it(choice: str, case: Any, around: str) -> None:
    assert choice_of(around.format(case(choice)), COLOURS) == choice


@pytest.mark.parametrize(
    ("answer", "choices", "choice"),
    [
        ("two", ("1", "2"), "2"),
        ("3", ("two", "three"), "three"),
        ("0", ("0", "1"), "0"),
        ("zero", ("0", "1"), "0"),
        ("red", ("Red", "red"), "red"),
        ("a red car", ("red", "blue"), None),
        ("", ("red", "blue"), None),
        ("...", ("red", "..."), "..."),
        ("２", ("1", "2"), "2"),
    ],
)
def test_choices(answer: str, choices: tuple[str, ...], choice: str | None) -> None:
    assert choice_of(answer, choices) == choice


def test_json_values_that_answer() -> None:
    assert list(map(text_of, [None, True, False, 0, 2.0, 2.5, " a "])) == ["", "yes", "no", "0", "2", "2.5", "a"]


def yes_no(answer: str) -> Question:
    return Question(1, "object", "is there a dog?", (0,), (), answer)


GOLD_NO = [
    yes_no("no"),
    yes_no("No."),
    Question(1, "x", "?", (0,), ("yes", "no"), "no"),
    Question(1, "x", "?", (), ("Yes", "No"), "NO"),
]


@pytest.mark.parametrize("question", GOLD_NO)
@pytest.mark.parametrize(
    ("said", "p_yes", "right"), [("no", 0.1, True), ("No", 0.1, True), ("yes", 0.9, False), ("Yes.", 0.9, False)]
)
def test_a_gold_no_is_right_where_the_judge_says_no_in_every_metric(
    question: Question, said: str, p_yes: float, right: bool
) -> None:
    yes, no = (question.choices or ("yes", "no"))[:2]
    answer = Answer(said, p_yes, None, {yes: p_yes, no: 1 - p_yes})
    values = metrics_of_answers([question], [answer])
    assert set(values) == set(ANSWER_METRICS)
    for name, value in values.items():
        if name == "soft_dsg" and question.answer not in ("yes", "no"):
            assert value is None
        elif name.startswith("soft"):
            assert value == pytest.approx(0.9 if right else 0.1), name
        else:
            assert value == float(right), name
    scored = score_answers("judge", [question], [answer])
    assert scored.score == float(right)
    assert scored.questions[0].counted is right


def test_without_probabilities_a_gold_no_has_the_chance_of_no() -> None:
    assert metrics_of_answers([yes_no("no")], [Answer("no", 0.2)])["soft_tifa_am"] == pytest.approx(0.8)


@pytest.mark.parametrize(("said", "score"), [("red", 1.0), ("RED.", 1.0), ("dark blue", 0.0), ("Dark Blue", 0.0)])
def test_choices_with_capitals(said: str, score: float) -> None:
    question = Question(1, "colour", "which?", (), COLOURS, "red")
    assert question.answer == "Red"
    judged = score_answers("judge", [question], [Answer(said)])
    assert (judged.score, judged.questions[0].answer) == (score, choice_of(said, COLOURS))
    assert metrics_of_answers([question], [Answer(said)])["tifa"] == score


def test_what_depends_on_a_gold_no_counts_where_the_answer_is_no() -> None:
    questions = [yes_no("no"), Question(2, "x", "is the place empty?", (1,))]
    assert score_answers("judge", questions, [Answer("no"), Answer("yes")]).score == 1.0
    assert score_answers("judge", questions, [Answer("yes"), Answer("yes")]).score == 0.0
