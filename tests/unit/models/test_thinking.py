"""What a model thought is no answer, whatever tags stand around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.models.thinking import split_thoughts

TAGS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("analysis", "assistantfinal"),
]
ANSWER = "4. a cat\n5. a dog"


@pytest.mark.parametrize(("opening", "closing"), TAGS)
@given(lines=st.lists(st.text("abc 123.-*", max_size=12), max_size=4))
def test_the_tags_of_every_model(opening: str, closing: str, lines: list[str]) -> None:
    thoughts = "\n".join(["We need a list", *lines])
    assert split_thoughts(f"{opening}{thoughts}")[0] == f"{opening}{thoughts}"
    for begun in (f"{opening}{thoughts}", f"\n {opening}{thoughts}"):
        assert split_thoughts(begun)[1].strip() == ""
        assert split_thoughts(f"{begun}{closing}{ANSWER}")[1].strip() == ANSWER
    both = f"{opening}{thoughts}{closing}\n{ANSWER}\n{opening}{thoughts}"
    if opening != "analysis":
        assert "need" not in split_thoughts(both)[1]
        assert ANSWER in split_thoughts(both)[1]


@pytest.mark.parametrize(
    "answer", ["", "a cat", " a cat\n5. a dog", "5. a sign </think>", "- a <think> b", "analysis of a cat"]
)
def test_an_answer_without_thoughts_is_left_alone(answer: str) -> None:
    assert split_thoughts(answer) == ("", answer)


def test_thoughts_that_the_chat_template_opened() -> None:
    assert split_thoughts("Let me see.\n4. a draft\n</think>\n\n4. a cat") == (
        "Let me see.\n4. a draft\n</think>",
        "\n\n\n4. a cat",
    )
    assert split_thoughts("Good.</think>4. a cat")[1].strip() == "4. a cat"


@given(st.text("<>/think[]◁▷| \n4.a", max_size=60))
def test_nothing_is_lost(answer: str) -> None:
    assert sorted("".join(split_thoughts(answer)).replace("\n", "")) == sorted(answer.replace("\n", ""))
