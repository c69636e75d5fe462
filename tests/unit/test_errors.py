"""What the command line finds of an error that Ray has wrapped, and the lines that stand for an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selma_ray.cluster.errors import known_error
from selma_ray.errors import ConfigError, LLMError, StorageError, first_line, last_line, named_line


class WrappedError(Exception):
    """An error that names its cause as Ray's do."""

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def test_an_error_is_found_behind_those_that_were_raised_from_it() -> None:
    known = StorageError("the folder cannot be written; free space")
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("the task failed") from WrappedError("ray::task", known)
    assert known_error(raised.value) is known
    assert known_error(known) is known


def test_an_error_is_found_in_the_text_of_another() -> None:
    text = (
        'ray::Map()\n  File "x.py", line 1\nselma_ray.errors.LLMError: the server refused; fix the key\n\nmore of Ray'
    )
    known = known_error(RuntimeError(text))
    assert type(known) is LLMError
    assert str(known) == "the server refused; fix the key"
    assert (
        type(known_error(WrappedError("task", RuntimeError("selma_ray.errors.ConfigError: one line")))) is ConfigError
    )


@pytest.mark.parametrize(
    "text", ["no such thing", "selma_ray.errors.known_errors: x", "selma_ray.errors.re: x", "LLMError: x"]
)
def test_other_errors_are_not_known(text: str) -> None:
    assert known_error(RuntimeError(text)) is None
    assert known_error(None) is None


def test_the_first_and_the_last_line_with_text_stand_for_an_error() -> None:
    error = ValueError("\n  no colour\nin scene 3\n\n  red is one \n")
    assert first_line(error) == "no colour"
    assert last_line(error) == "red is one"
    assert named_line(error) == "ValueError: no colour"
    assert first_line(str(error)) == "no colour"


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\t\r\n"])
def test_an_error_without_text_is_known_by_its_class(text: str) -> None:
    assert (
        first_line(MemoryError(text)) == last_line(MemoryError(text)) == named_line(MemoryError(text)) == "MemoryError"
    )
    assert first_line(text) == last_line(text) == ""
    assert first_line(MemoryError()) == "MemoryError"


@given(st.text())
def test_every_text_gives_one_line_of_it(text: str) -> None:
    for line in (first_line(text), last_line(text), first_line(OSError(text)), named_line(OSError(text))):
        assert len(line.splitlines()) <= 1
        assert line == line.strip()
    assert first_line(text) in text
    assert last_line(text) in text
    assert len(named_line(OSError(text))) <= 200
