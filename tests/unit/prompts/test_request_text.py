import pytest

from selma_ray.prompts.requests import compose_grammar, request_text
from selma_ray.skills import Skill

SKILL = Skill(
    name="counting",
    description="captions that count",
    max_words=30,
    rules=("No number exceeds three.",),
    seeds=("two cats",),
)


def test_request_shows_numbered_examples_and_ends_in_the_next_number() -> None:
    text = request_text(SKILL, ["two cats", "three dogs"], 20)
    assert text.endswith("\n1. two cats\n2. three dogs\n3.")
    assert "20 new descriptions" in text
    assert "- No number exceeds three." in text
    assert "at most 30 words" in text
    assert SKILL.description in text


def test_grammar_of_an_answer_numbers_the_captions_after_the_first() -> None:
    grammar = compose_grammar('caption ::= "a " noun\nnoun ::= "cat" | "dog"', first_number=4, num_prompts=3)
    assert grammar.splitlines()[0] == r'root ::= " " caption "\n5. " caption "\n6. " caption "\n"'


@pytest.mark.parametrize(
    ("answer", "inside"),
    [
        (" a cat\n5. a dog\n6. a cat\n", True),
        (" a cat\n5. a dog\n", False),
        (" a cow\n5. a dog\n6. a cat\n", False),
        ("a cat\n5. a dog\n6. a cat\n", False),
    ],
)
def test_grammar_is_one_that_the_engine_accepts(answer: str, inside: bool) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    grammar = compose_grammar('caption ::= "a " noun\nnoun ::= "cat" | "dog"', first_number=4, num_prompts=3)
    compiled = xgrammar.Grammar.from_ebnf(grammar)
    from xgrammar.testing import _is_grammar_accept_string

    assert _is_grammar_accept_string(compiled, answer) is inside
