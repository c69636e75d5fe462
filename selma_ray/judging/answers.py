"""What an answer means: which of a question's choices it names, however it is written."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from selma_ray.judging.numerals import surface_forms

__all__ = ["choice_of", "text_of"]

_AROUND = " \t\r\n.,;:!?…\"'`*“”‘’«»。，！？"


def choice_of(answer: str, choices: Sequence[str]) -> str | None:
    """Return the choice that an answer names; None where it names none.

    Case, white space, width and punctuation around it do not count; a number is the same in words and in figures.
    """
    if answer in choices:
        return answer
    plain = _plain(answer)
    spelled = next((choice for choice in choices if _plain(choice) == plain), None)
    if spelled is not None or not plain:
        return spelled
    return next((choice for choice in choices if plain in map(_plain, surface_forms(choice))), None)


def text_of(value: Any) -> str:
    """Return a JSON value that answers as words: true is yes, false is no, 2.0 is 2, null is nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(_AROUND).split())
