"""What the command line finds of an error that Ray has wrapped."""

import pytest

from selma_ray.cluster.errors import known_error
from selma_ray.errors import ConfigError, LLMError, StorageError


class WrappedError(Exception):
    """An error that names its cause as Ray's do."""

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def test_an_error_is_found_behind_those_that_were_raised_from_it():
    known = StorageError("the folder cannot be written; free space")
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("the task failed") from WrappedError("ray::task", known)
    assert known_error(raised.value) is known
    assert known_error(known) is known


def test_an_error_is_found_in_the_text_of_another():
    text = (
        'ray::Map()\n  File "x.py", line 1\nselma_ray.errors.LLMError: the server refused; mend the key\n\nmore of Ray'
    )
    known = known_error(RuntimeError(text))
    assert type(known) is LLMError
    assert str(known) == "the server refused; mend the key"
    assert (
        type(known_error(WrappedError("task", RuntimeError("selma_ray.errors.ConfigError: one line")))) is ConfigError
    )


@pytest.mark.parametrize(
    "text", ["no such thing", "selma_ray.errors.known_errors: x", "selma_ray.errors.re: x", "LLMError: x"]
)
def test_other_errors_are_not_known(text):
    assert known_error(RuntimeError(text)) is None
    assert known_error(None) is None
