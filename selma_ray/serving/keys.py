"""Bearer keys: read from a file, kept as digests, compared in constant time."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from selma_ray.errors import ConfigError

__all__ = ["accepts", "first_key", "read_key_digests"]

_MIN_KEY_CHARS = 16
_DIGEST_LINE = re.compile(r"sha256:([0-9a-fA-F]{64})")


def read_key_digests(path: str | Path) -> tuple[bytes, ...]:
    """Return the SHA-256 digests of a file's keys: one key a line, or sha256:<hex digest>; # starts a comment line.

    Raises ConfigError where the file cannot be read, is empty, or holds a short key.
    """
    return tuple(_digest_of_line(line, path, number) for number, line in _lines(path))


def first_key(path: str | Path) -> str | None:
    """Return the file's first key that is not given as a digest."""
    return next((line for _, line in _lines(path) if not _DIGEST_LINE.fullmatch(line)), None)


def accepts(digests: Sequence[bytes], authorization: str) -> bool:
    """Tell whether the Authorization header bears one of the keys, in a time that does not depend on which."""
    scheme, _, key = authorization.partition(" ")
    presented = hashlib.sha256(key.strip().encode()).digest()
    matches = [hmac.compare_digest(presented, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(matches)


def _lines(path: str | Path) -> list[tuple[int, str]]:
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"api_keys_file {path} cannot be read ({type(error).__name__}); name a text file of keys"
        ) from None
    kept = [
        (number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not kept:
        raise ConfigError(f"api_keys_file {path} must hold at least one key; write one a line")
    return kept


def _digest_of_line(line: str, path: str | Path, number: int) -> bytes:
    match = _DIGEST_LINE.fullmatch(line)
    if match:
        return bytes.fromhex(match.group(1))
    if len(line) < _MIN_KEY_CHARS or " " in line:
        raise ConfigError(
            f"api_keys_file {path} line {number} must be a key of {_MIN_KEY_CHARS} characters or more without spaces"
        )
    return hashlib.sha256(line.encode()).digest()
