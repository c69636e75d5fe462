"""Reading what language models write: tolerantly, with counts, and without ever raising."""

import csv
import json
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.judging.writing.parsing import (
    parse_json,
    parse_lines,
    parse_parents,
    parse_tifa_json,
    parse_tifa_text,
    tuple_category,
)

TEXTS = ["entity - whole (motorcycle)", "attribute - color (door, red | blue)", 'other - text rendering (sign, "a|b")']


def test_the_plain_format() -> None:
    answer = "\n".join(f"{number} | {text}" for number, text in enumerate(TEXTS, start=1))
    assert parse_lines(answer).texts == dict(enumerate(TEXTS, start=1))
    assert not parse_lines(answer).ignored


@pytest.mark.parametrize("line", ["1 | x", "1. x", "1) x", "1: x", "1. | x", " 1|x ", "- 1 | x", "001 | x"])
def test_every_numbering(line: str) -> None:
    assert parse_lines(line).texts == {1: "x"}


def test_what_is_around_the_answer_is_left_out_and_counted() -> None:
    parsed = parse_lines("Sure! Here they are:\noutput: 1 | a\n\n2 |\n1 | b\n3 | c\n\ninput: another\noutput: 4 | d")
    assert parsed.texts == {1: "a", 3: "c"}
    assert parsed.ignored == {"empty text": 1, "duplicated id": 1}
    assert parse_lines("I cannot do that.").ignored == {"line without a number": 1}


def test_json() -> None:
    assert parse_json('["a", " b  c "]').texts == {1: "a", 2: "b c"}
    assert parse_json('Sure: {"1": "a", "2": [1, 3], "3": []} done').texts == {1: "a", 2: "1,3", 3: "0"}
    parsed = parse_json('{"1": "", "x": "a", "2": null}')
    assert (parsed.texts, parsed.ignored) == ({}, {"empty text": 2, "id that is no number": 1})
    assert parse_json("{}").ignored == {"no items": 1}
    for broken in ('["a", "b', "no list", "", "[" * 5000, '"text"'):
        assert parse_json(broken).ignored == {"no JSON": 1}


@pytest.mark.parametrize(
    ("answer", "call", "texts"),
    [
        ('[{"id": 1, "tuple": "a"}, {"id": 2, "tuple": "b"}]', "tuple", {1: "a", 2: "b"}),
        ('[{"tuple": "a"}, {"tuple": "b"}]', "tuple", {1: "a", 2: "b"}),
        (
            '[{"id": "2.", "Question": " is it  red? "}, {"id": 1.0, "question": "b?"}]',
            "question",
            {2: "is it red?", 1: "b?"},
        ),
        ('[{"id": 2, "tuple": "a", "dependencies": [1]}, {"id": 1, "parents": []}]', "dependency", {2: "1", 1: "0"}),
        ('[{"id": 2, "dependencies": "1, 3"}, {"id": 1, "dependency": 0}]', "dependency", {2: "1, 3", 1: "0"}),
        ('[{"1": "a"}, {"2": "b"}]', "tuple", {1: "a", 2: "b"}),
        ('{"tuples": ["a", "b"]}', "tuple", {1: "a", 2: "b"}),
        ('{"tuples": {"1": "a"}}', "tuple", {1: "a"}),
        ('{"1": {"question": "a?"}, "2": {"text": "b?"}}', "question", {1: "a?", 2: "b?"}),
        ('{"1": 0, "2": [0], "3": 1}', "dependency", {1: "0", 2: "0", 3: "1"}),
        ('```json\n["a"]\n```', "tuple", {1: "a"}),
        ('As said [above] {see there}: ["a"]', "tuple", {1: "a"}),
        ('<think>maybe ["draft"] or {"1": "draft"}</think>["a"]', "tuple", {1: "a"}),
        ('["draft"]?\n</think>\n["a"]', "tuple", {1: "a"}),
        ('<think>maybe ["draft"]', "tuple", {}),
        ('{"1": "a", "2": ["b", "c"], "3": "d', "tuple", {}),
        ('["a [1, 2]', "tuple", {}),
        ('["a", NaN]', "tuple", {}),
        ('[{"id": 1, "category": "x", "kind": "y"}]', "tuple", {}),
    ],
)
def test_json_of_other_shapes(answer: str, call: Any, texts: dict[int, str]) -> None:
    parsed = parse_json(answer, call)
    assert parsed.texts == texts
    assert parsed.texts or parsed.ignored


THOUGHTS = st.lists(
    st.sampled_from(["1 | a thought", "2. another", "output: 3 | x", "input: y", '["z"]', "A: yes"])
).map("\n".join)


@given(
    THOUGHTS,
    st.sampled_from([("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("", "</think>"), ("◁think▷", "◁/think▷")]),
)
def test_thoughts_are_no_tuples_and_no_questions(thoughts: str, tags: tuple[str, str]) -> None:
    opening, closing = tags
    before = f"{opening}Let me see\n{thoughts}\n{closing}\n"
    assert parse_lines(before + GOOD_LINES) == parse_lines(GOOD_LINES)
    assert parse_json(before + GOOD_JSON) == parse_json(GOOD_JSON)
    assert parse_tifa_text(before + TIFA_TEXT) == parse_tifa_text(TIFA_TEXT)
    if opening:
        assert parse_lines(f"{opening}Let me see\n{thoughts}").texts == {}
        assert parse_json(f"{opening}Let me see\n{thoughts}").texts == {}


def test_parents_as_models_write_them() -> None:
    assert parse_parents({1: "None.", 2: "[1]", 3: "1, 2.", 4: "1、3", 5: "(0)"}, [1, 2, 3, 4, 5]) == (
        {1: (0,), 2: (1,), 3: (1, 2), 4: (1, 3), 5: (0,)},
        Counter(),
    )


@pytest.mark.parametrize(
    ("choices", "answer", "gold"),
    [
        (["yes", "no"], "Yes", "yes"),
        (["yes", "no"], "no.", "no"),
        (["yes", "no"], False, "no"),
        (["Red", "Blue"], "red", "Red"),
        (["0", "1", "2"], "0", "0"),
        ([0, 1, 2], 0, "0"),
        (["1", "2"], "two", "2"),
        ("red, blue.", "Blue", "blue"),
        ({"A": "red", "B": "blue"}, "blue", "blue"),
        (["yes", "no"], None, None),
        (["yes", "no"], "", None),
        (["yes", "no"], "maybe", None),
        (["yes"], "yes", None),
        (7, "yes", None),
    ],
)
def test_gold_answers_as_models_write_them(choices: Any, answer: Any, gold: str | None) -> None:
    row = {"type": "Counting", "question": "how many?", "choices": choices, "answer": answer}
    for value in ([row], {"questions": [row]}):
        questions, ignored = parse_tifa_json(json.dumps(value))
        assert [each.answer for each in questions] == ([] if gold is None else [gold])
        assert ignored.total() == (gold is None)
        assert all(each.category == "counting" and gold in each.choices for each in questions)
    if isinstance(choices, list) and not isinstance(answer, bool) and answer is not None:
        listed = ", ".join(map(str, choices))
        text = f"About x (counting):\n**Q:** how many?\nChoices: {listed}.\nA: {answer}"
        assert [each.answer for each in parse_tifa_text(text)[0]] == ([] if gold is None else [gold])


def test_parents() -> None:
    texts = {1: "-", 2: "1", 3: "2, 1, 2", 4: "none", 5: "5, 9, right, 0, 1"}
    parents, dropped = parse_parents(texts, [1, 2, 3, 4, 5])
    assert parents == {1: (0,), 2: (1,), 3: (2, 1), 4: (0,), 5: (1,)}
    assert dropped == {"self parent": 1, "unknown parent": 1, "parent that is no number": 1}
    parents, dropped = parse_parents({1: "3", 2: "1", 3: "2"}, [1, 2, 3])
    assert dropped == {"cyclic parent": 1}
    assert parents == {1: (3,), 2: (1,), 3: (0,)}


def test_one_expression_reads_every_tuple_of_dsg1k(shared_eval: Path) -> None:
    with (shared_eval / "dsg" / "dsg-1k-anns.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 8182
    for row in rows:
        assert tuple_category(row["tuple"]) == (row["category_detailed"] or row["category_broad"])
    assert tuple_category("a red door") == "other"


TIFA_TEXT = """Entities: dog
Questions and answers are below:
About dog (animal):
Q: is there a dog?
Choices: yes, no
A: yes
Q: what colour?
Choices: red, red
A: red
Q: unanswered?
Q: is it big?
Choices: yes, no
A: maybe
About moon (planet):
Q: is there a moon?
Choices: yes, no
A: yes
About red (color):
q: what color is the dog?
options: red, blue
answer: red
Q: is there a dog?
Choices: yes, no
A: yes

Description: another prompt
About cat (animal):
Q: is there a cat?
Choices: yes, no
A: yes"""


def test_tifas_text() -> None:
    questions, ignored = parse_tifa_text(TIFA_TEXT)
    assert [(each.id, each.category, each.question, each.choices, each.answer) for each in questions] == [
        (1, "animal/human", "is there a dog?", ("yes", "no"), "yes"),
        (2, "color", "what color is the dog?", ("red", "blue"), "red"),
    ]
    assert ignored == {
        "fewer than two choices": 1, "question without an answer": 1, "answer that is no choice": 1, "unknown type": 1,
        "duplicated question": 1,
    }  # fmt: skip


def test_tifas_json() -> None:
    good = {"element": "dog", "type": "animal", "question": "is there?", "choices": ["yes", "no"], "answer": "yes"}
    questions, ignored = parse_tifa_json(
        json.dumps([good, {**good, "question": ""}, 3, {**good, "question": "is it?", "choices": "yes"}])
    )
    assert [each.category for each in questions] == ["animal/human"]
    assert ignored == {"empty question": 1, "question that is no object": 1, "fewer than two choices": 1}
    assert parse_tifa_json("{}")[1] == {"no JSON": 1}


# --- mutated answers -----------------------------------------------------------------------------------------------------------

GOOD_LINES = "\n".join(f"{number} | {text}" for number, text in enumerate([*TEXTS, "relation - (a, b)"], start=1))
GOOD_JSON = json.dumps({str(number): text for number, text in enumerate(TEXTS, start=1)})
JUNK = st.text(alphabet="0123456789|.,:)(-[]{}\"' \n\tabcQA•é", max_size=12)


@st.composite
def mutated(draw: Any, text: Any) -> Any:
    """A good answer with pieces deleted, doubled, moved and replaced by junk."""
    for _ in range(draw(st.integers(0, 6))):
        start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        kind = draw(st.sampled_from(["delete", "double", "junk", "cut"]))
        if kind == "delete":
            text = text[:start] + text[end:]
        elif kind == "double":
            text = text[:end] + text[start:end] + text[end:]
        elif kind == "junk":
            text = text[:start] + draw(JUNK) + text[start:]
        else:
            text = text[:end]
    return text


@given(mutated(GOOD_LINES))
@settings(max_examples=200, deadline=None)
def test_mutated_lines_are_read_or_counted(answer: Any) -> None:
    parsed = parse_lines(answer)
    assert all(
        number >= 0 and text and text == text.strip() and "\n" not in text for number, text in parsed.texts.items()
    )
    lines = [line for line in answer.partition("input:")[0].splitlines() if line.strip()]
    assert len(parsed.texts) + sum(parsed.ignored.values()) <= len(lines) + 1
    again = "\n".join(f"{number} | {text}" for number, text in parsed.texts.items())
    assert parse_lines(again).texts == parsed.texts


@given(mutated(GOOD_JSON))
@settings(max_examples=200, deadline=None)
def test_mutated_json_is_read_or_counted(answer: Any) -> None:
    parsed = parse_json(answer)
    assert parsed.texts or parsed.ignored
    assert all(text.strip() for text in parsed.texts.values())


@given(mutated(TIFA_TEXT))
@settings(max_examples=200, deadline=None)
def test_mutated_tifa_questions_are_sound(answer: Any) -> None:
    questions, _ = parse_tifa_text(answer)
    assert [each.id for each in questions] == list(range(1, len(questions) + 1))
    assert len({each.question for each in questions}) == len(questions)
    assert all(each.answer in each.choices and len(set(each.choices)) >= 2 for each in questions)


@given(st.dictionaries(st.integers(1, 8), st.text(alphabet="012345678,- nroe", max_size=10), max_size=8))
@settings(max_examples=200, deadline=None)
def test_parents_are_always_a_graph_without_cycles_among_the_ids(texts: Any) -> None:
    ids = list(texts)
    parents, _ = parse_parents(texts, ids)
    assert list(parents) == ids
    assert all(each and set(each) <= {0, *ids} for each in parents.values())
    TopologicalSorter({number: set(each) - {0} for number, each in parents.items()}).prepare()
