from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.prompts.parsing import ListItem, parse_numbered_list


def texts(answer: str) -> list[str]:
    return [item.text for item in parse_numbered_list(answer) if item.parsed]


def unparsed(answer: str) -> list[str]:
    return [item.text for item in parse_numbered_list(answer) if not item.parsed]


def test_list_that_goes_on_from_the_request() -> None:
    assert texts(" a cat\n5. a dog\n6. a cow\n") == ["a cat", "a dog", "a cow"]


@pytest.mark.parametrize(
    "marker", ["5.", "5)", "(5)", "5:", "#5.", "5.)", "**5.**", "**5**.", "-", "*", "•", "  5. ", "12."]
)
def test_markers(marker: str) -> None:
    assert texts(f" a cat\n{marker} a dog") == ["a cat", "a dog"]


def test_blank_lines_and_restarted_numbers() -> None:
    assert texts(" a cat\n\n\n1. a dog\n\n2. a cow") == ["a cat", "a dog", "a cow"]


def test_quotes_and_repeated_spaces_are_removed() -> None:
    assert texts(' "a  cat"\n5. “a dog”\n6. **a cow**\n7. a "red" cow') == ["a cat", "a dog", "a cow", 'a "red" cow']


def test_remarks_are_returned_as_not_parsed() -> None:
    answer = "\nHere are more descriptions:\n5. a dog\nI hope that these help!\n6.\n"
    assert texts(answer) == ["a dog"]
    assert unparsed(answer) == ["Here are more descriptions:", "I hope that these help!", "6."]


@pytest.mark.parametrize(
    "answer", ["4. a cat\n5. a dog", "\n4) a cat\n\n5) a dog", "- a cat\n- a dog", " 1. a cat\n2. a dog"]
)
def test_a_number_that_the_llm_wrote_again_is_no_part_of_the_first_item(answer: str) -> None:
    assert texts(answer) == ["a cat", "a dog"]


@pytest.mark.parametrize("first", ["Sure! Here are 20 new descriptions:", "**Spatial relations:**", "4. Animals:"])
def test_preambles_and_headings_are_no_items(first: str) -> None:
    assert texts(f"{first}\n1. a cat\n\n2. a dog") == ["a cat", "a dog"]
    assert unparsed(f"{first}\n1. a cat") == [first]


def test_a_number_with_a_fraction_is_no_marker() -> None:
    assert texts(" a jug\n4.5 litres of milk\n5. 2.5 litres of milk") == ["a jug", "2.5 litres of milk"]
    assert texts("4.5 litres of milk") == ["4.5 litres of milk"]


def test_what_a_reasoning_model_thought_is_not_parsed() -> None:
    answer = "<think>\nThe list goes on:\n1. a draft\n</think>\n\n4. a cat\n5. a dog"
    assert texts(answer) == ["a cat", "a dog"]
    assert unparsed(answer) == ["<think>", "The list goes on:", "1. a draft", "</think>"]


@pytest.mark.parametrize("answer", ["", "\n", " \n \n"])
def test_empty_answers(answer: str) -> None:
    assert parse_numbered_list(answer) == []


@given(st.text())
def test_no_line_is_lost(answer: str) -> None:
    lines = [line for line in answer.split("\n") if line.strip()]
    assert len(parse_numbered_list(answer)) == len(lines)


@given(st.lists(st.text("abc xyz.,'", min_size=1).map(str.strip).filter(lambda text: text[:1].isalpha()), min_size=1))
def test_written_lists_are_read_back(captions: Any) -> None:
    first, *rest = captions
    answer = f" {first}\n" + "\n".join(f"{number}. {caption}" for number, caption in enumerate(rest, start=5))
    assert parse_numbered_list(answer) == [ListItem(" ".join(caption.split()), parsed=True) for caption in captions]
