"""Ray's errors in our words; knows Ray's errors by their attributes and their text alone, and loads no Ray."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from selma_ray import errors
from selma_ray.errors import SelmaError, last_line

__all__ = ["ActorFailure", "actor_failure", "causes_of", "known_error", "reason_of"]

_REASON_CHARS = 300


@dataclass(frozen=True)
class ActorFailure:
    """How an actor of a stage ended a stream: it could not start, or died more often than its restarts allow."""

    could_not_start: bool
    reason: str
    """The last line of what Ray says of it."""


def actor_failure(error: BaseException, *stages: str) -> ActorFailure | None:
    """Return how an actor of one of `stages`, named by its class, ended a stream; None where the failure is another's.

    Only the text of Ray's errors names the class.
    """
    for message in map(str, causes_of(error)):
        if any(stage in message for stage in stages) and ("actor died" in message or "creation task" in message):
            return ActorFailure("creation task" in message, last_line(message)[:_REASON_CHARS])
    return None


def reason_of(error: BaseException) -> str:
    """Return in one line what a failed task or actor raised: our own error's words, else the last line of Ray's text."""
    known = known_error(error)
    return str(known) if known else last_line(error)[:_REASON_CHARS]


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
