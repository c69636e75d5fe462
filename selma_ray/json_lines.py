"""JSON Lines and text files as people have them: UTF-8 with or without a byte order mark, lines that end at "\\n" alone."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["ENCODING", "json_lines", "numbered_lines", "parse_json", "refuse_constant"]

ENCODING = "utf-8-sig"
"""UTF-8, without the mark that spreadsheets put before it."""

_BYTE_ORDER_MARK = "\ufeff"
# Programs that split lines in more places than "\n" would break a line at these.
_LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that hold something, each with its number from 1; raises OSError and UnicodeDecodeError."""
    # Whatever other line separators a text has are its own; open() would translate "\r" alone, too.
    lines = path.read_bytes().decode(ENCODING).split("\n")
    stripped = ((number, line.lstrip(_BYTE_ORDER_MARK).strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line]


def parse_json(text: str) -> Any:
    """Return a JSON value; raises ValueError for what is none, NaN and infinities among it, and for halves of surrogate pairs."""
    value = json.loads(text, parse_constant=refuse_constant, parse_float=_finite)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"half of a surrogate pair, \\u{ord(half):04x}, stands alone") from None
    return value


def json_lines(values: Iterable[Any]) -> bytes:
    """Return values as JSON Lines, which `numbered_lines` and `parse_json` read back, and readers that break more lines do too.

    Raises ValueError for a float that is not finite and half of a surrogate pair.
    """
    lines = (json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS) + "\n" for value in values)
    return "".join(lines).encode()


def refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN and infinities, which Python's JSON decoder would take."""
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is no finite number")
    return number
