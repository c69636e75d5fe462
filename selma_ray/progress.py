"""How far a stage has come: the one shape in which stages tell it and the command line shows it."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Report"]


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: `done` of `total` units, with a detail for people, and figures that take a line each."""

    stage: str
    done: int
    total: int
    detail: str = ""
    figures: tuple[str, ...] = ()


Report = Callable[[Progress], None]
