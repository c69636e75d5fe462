"""What a library imports where it finds it, though nothing here uses it, and every process pays for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["as_if_absent"]


@contextmanager
def as_if_absent(package: str) -> Iterator[None]:
    """Let imports inside fail to find a package that nobody has imported yet; it can be imported afterwards."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # which is how the import system is told that it is not there
    try:
        yield
    finally:
        del sys.modules[package]
