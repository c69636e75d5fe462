"""Ray's errors in our words; knows Ray's errors by their attributes and their text alone, and loads no Ray."""

import re
from collections.abc import Iterator
from typing import Any

from selma_ray import errors
from selma_ray.errors import SelmaError

__all__ = ["causes_of", "known_error"]


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def known_error(error: BaseException | None) -> SelmaError | None:
    """Return the SelmaError that an error is or was caused by; Ray wraps what tasks and actors raise.

    Of what a stage of Ray Data raises, only the text comes out: the last line of a traceback in a longer message.
    """
    links, seen = [], set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        links.append(error)
        cause: Any = getattr(error, "cause", None)
        if isinstance(cause, BaseException):
            error = cause
            continue
        if isinstance(error, SelmaError):
            return error
        error = error.__cause__ or error.__context__
    return next(filter(None, (_quoted_error(str(link)) for link in links)), None)


def _quoted_error(message: str) -> SelmaError | None:
    found = re.search(rf"^{re.escape(errors.__name__)}\.(?P<kind>\w+Error): (?P<line>.+)", message, re.MULTILINE)
    kind = getattr(errors, found["kind"], None) if found else None
    return kind(found["line"]) if found and kind else None
