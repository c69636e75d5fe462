from collections import Counter
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
    "marker",
    [
        "5.", "5)", "(5)", "5:", "#5.", "5.)", "**5.**", "**5**.", "-", "*", "•", "  5. ", "12.", "### 5.", "[5]", "5 -", "5️⃣", "+",
        "5、", "５．", "（5）", "5：", "٥.", "・", "\u200b5.",
    ],
)  # fmt: skip
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


def letters(text: str) -> Counter[str]:
    return Counter(character for character in text if character.isalpha())


@given(st.text() | st.text("ab A4.*-_\"'「」：:<>/think \n", max_size=80))
def test_no_letter_is_lost(answer: str) -> None:
    assert sum((letters(item.text) for item in parse_numbered_list(answer)), Counter()) == letters(answer)


@given(st.text() | st.text("ab A4.*-_\"'「」：: \n—…🐈", max_size=80))
def test_every_prompt_says_something_on_one_line(answer: str) -> None:
    for text in texts(answer):
        assert any(character.isalnum() for character in text)
        assert "\n" not in text
        assert text == text.strip()


@pytest.mark.parametrize(
    "line",
    [
        "---",
        "* * *",
        "***",
        "- - -",
        "_ _ _",
        "===",
        '4. ""',
        "5. ...",
        "4. “”",
        "6. **",
        "7. —",
        "- 🐈",
        "4. 。",
        "```",
        "4. \u200b",
    ],
)
def test_a_line_without_a_letter_or_digit_is_no_prompt(line: str) -> None:
    assert texts(f" a cat\n{line}\n5. a dog") == ["a cat", "a dog"]
    assert unparsed(f" a cat\n{line}\n5. a dog") == [line.strip()]


@pytest.mark.parametrize(
    "note",
    [
        "- Note: all differ",
        "Note: all differ",
        "* **Note**: all differ",
        "**Notes:** all differ",
        "7. P.S.: all",
        "- 注意：全部",
        "- Hinweis: alle",
    ],
)
def test_a_closing_note_is_no_prompt(note: str) -> None:
    assert texts(f" a cat\n5. a dog\n\n{note}") == ["a cat", "a dog"]
    assert unparsed(f" a cat\n5. a dog\n{note}") == [note]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("4. **The Harbour**\n   A boat rests.", "The Harbour: A boat rests."),
        ("4. **The Harbour**\nA boat rests.", "The Harbour: A boat rests."),
        ("4. **The Harbour**\n\n   A boat rests.", "The Harbour: A boat rests."),
        ("4. **The Harbour:**\n   A boat rests\n   at dawn.", "The Harbour: A boat rests at dawn."),
        ("**4. The Harbour**\n   A boat rests.", "The Harbour: A boat rests."),
        ("4. __The Harbour__\nA boat rests.", "The Harbour: A boat rests."),
        ("4. **The Harbour**: A boat rests.", "The Harbour: A boat rests."),
        ("4.\nA boat rests.", "A boat rests."),
        ("- **The Harbour**\nA boat rests.", "The Harbour: A boat rests."),
        ("* **The Harbour:**\n  A boat rests.", "The Harbour: A boat rests."),
        ("4. **The Harbour**\n   - A boat rests at\n     the pier.", "The Harbour: A boat rests at the pier."),
        ("4. A boat rests at\nthe pier", "A boat rests at the pier"),
        ("4. A boat rests at\n   the pier\n   In the sun", "A boat rests at the pier In the sun"),
        ("4. A boat,\nMary and a well-\nlit pier", "A boat, Mary and a well-lit pier"),
        ("- A boat rests at\n  the pier", "A boat rests at the pier"),
        ("4、一只猫坐在\n垫子上", "一只猫坐在垫子上"),
        ("4. Лодка стоит\nу причала", "Лодка стоит у причала"),
    ],
)
def test_the_lines_of_an_item_are_one_text(lines: str, text: str) -> None:
    assert texts(f"\n{lines}\n5. a dog") == [text, "a dog"]
    assert texts(f"\n3. a cow\n{lines}\n\nI hope that these help!") == ["a cow", text]


def test_the_first_item_may_have_a_title() -> None:
    assert texts(" **The Harbour**\nA boat rests.\n5. a dog") == ["The Harbour: A boat rests.", "a dog"]
    assert texts("**Here they are:**\n4. a cat") == ["a cat"]


def test_a_title_of_several_bullets_is_their_heading() -> None:
    answer = "\n1. **Relations**\n   - a cat beside a dog\n   - a dog on a mat\n2. **Counts**\n   - two cats"
    assert texts(answer) == ["a cat beside a dog", "a dog on a mat", "Counts: two cats"]
    assert unparsed(answer) == ["1. **Relations**"]


@pytest.mark.parametrize("text", ["2 - 3 cats", "*a* cat", "4:30 in a square", "2.5 litres", "3-legged stool"])
def test_what_only_looks_like_a_marker_is_a_part_of_the_item(text: str) -> None:
    assert texts(f" {text}\n5. {text}") == [text, text]


@pytest.mark.parametrize(
    "remark", ["I hope that these help!", "Let me know.", "\nlet me know", "## Animals", "</list>"]
)
def test_a_remark_is_no_part_of_the_item_before_it(remark: str) -> None:
    assert texts(f" a cat\n5. a dog\n{remark}\n6. a cow") == ["a cat", "a dog", "a cow"]


QUOTES = [
    '""', "''", "“”", "‘’", "„“", "«»", "»«", "‹›", "「」", "『』", "``", "＂＂", "❝❞", "**", "__", "”“", "’’",
]  # fmt: skip


@pytest.mark.parametrize("quotes", QUOTES)
@given(words=st.lists(st.sampled_from(["a", "stop", "sign", "猫", "the dog's"]), min_size=1, max_size=4))
def test_quotation_marks_go_only_where_they_enclose_the_whole(quotes: str, words: list[str]) -> None:
    opening, closing = quotes[0], quotes[1]
    text = " ".join(words)
    assert texts(f"\n4. {opening}{text}{closing}") == [text]
    if "_" not in quotes and "*" not in quotes:
        partly = f"{opening}{text}{closing} beside {opening}open{closing}"
        assert texts(f"\n4. {partly}") == [partly]
        assert texts(f"\n4. {text} beside {opening}open{closing}") == [f"{text} beside {opening}open{closing}"]


def test_a_sign_between_quoted_names_keeps_its_marks() -> None:
    assert texts('\n4. "Stop" sign beside a shop named "Open"') == ['"Stop" sign beside a shop named "Open"']
    assert texts("\n4. 'Stop' beside 'Open'\n5. \"a 'red' sign\"") == ["'Stop' beside 'Open'", "a 'red' sign"]


def test_thoughts_are_never_prompts() -> None:
    for opening in ("<think>", "[THINK]", "<thought>", "<seed:think>"):
        assert texts(f"{opening}\nThe list:\n4. a draft\n5. a draft of a dog") == []
    assert texts("4. a cat\n5. a robot says </think>\n6. a cow") == ["a cat", "a robot says </think>", "a cow"]
    assert texts("<think>x</think>\n4. a cat\n5. a sign </think> here\n6. a cow") == [
        "a cat",
        "a sign </think> here",
        "a cow",
    ]


@given(st.lists(st.text("abc xyz.,'", min_size=1).map(str.strip).filter(lambda text: text[:1].isalpha()), min_size=1))
def test_written_lists_are_read_back(captions: Any) -> None:
    first, *rest = captions
    answer = f" {first}\n" + "\n".join(f"{number}. {caption}" for number, caption in enumerate(rest, start=5))
    assert parse_numbered_list(answer) == [ListItem(" ".join(caption.split()), parsed=True) for caption in captions]
