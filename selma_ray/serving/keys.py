"""Bearer keys: read from a file, kept as digests, compared in constant time, each with its limit on requests."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selma_ray.errors import ConfigError

__all__ = ["ApiKey", "Bucket", "Limits", "Taken", "find_key", "new_key", "read_keys"]

_MIN_KEY_CHARS = 16
_DIGEST_LINE = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class ApiKey:
    """A key that is accepted: its SHA-256 digest, and how often it may be used."""

    digest: bytes
    requests_per_minute: int | None = None


class Bucket:
    """Tokens that refill evenly to `per_minute` and never above; a request takes one."""

    def __init__(self, per_minute: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._now_s = now_s
        self._tokens = float(per_minute)
        self._filled_at_s = now_s()

    def take(self) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        now_s = self._now_s()
        self._tokens = min(self._per_minute, self._tokens + (now_s - self._filled_at_s) * self._per_minute / 60)
        self._filled_at_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) * 60 / self._per_minute

    def headers(self) -> dict[str, str]:
        """Return the limit, what is left of it and when it is whole again, as OpenAI's API tells them."""
        whole_s = (self._per_minute - self._tokens) * 60 / self._per_minute
        return {
            "x-ratelimit-limit-requests": str(self._per_minute),
            "x-ratelimit-remaining-requests": str(int(self._tokens)),
            "x-ratelimit-reset-requests": f"{whole_s:.0f}s",
        }


@dataclass(frozen=True)
class Taken:
    """What came of a use of a key with a limit."""

    wait_s: float
    """0, or the seconds until it may be used again."""
    headers: dict[str, str]
    """What its holder is told of the limit."""


class Limits:
    """How often each key may still be used."""

    def __init__(self, keys: Sequence[ApiKey], now_s: Callable[[], float] = time.monotonic) -> None:
        self._buckets = {
            key.digest: Bucket(key.requests_per_minute, now_s) for key in keys if key.requests_per_minute is not None
        }

    def take(self, digest: bytes) -> Taken | None:
        """Count a use of the key with this digest; None where it has no limit."""
        bucket = self._buckets.get(digest)
        return None if bucket is None else Taken(bucket.take(), bucket.headers())


def read_keys(path: str | Path, requests_per_minute: int | None = None) -> tuple[ApiKey, ...]:
    """Return a file's keys: a line holds a key or sha256:<hex digest>, and a limit if not `requests_per_minute`.

    A line that starts with # is a comment. Raises ConfigError where the file cannot be read, is empty, or a line is wrong.
    """
    return tuple(_key_of_line(line, path, number, requests_per_minute) for number, line in _lines(path))


def new_key() -> tuple[str, ApiKey]:
    """Return a key that nobody has had before, and how it is accepted: a program asks its own service with it."""
    key = secrets.token_urlsafe(32)
    return key, ApiKey(hashlib.sha256(key.encode()).digest())


def find_key(keys: Sequence[ApiKey], authorization: str) -> ApiKey | None:
    """Return the key that the Authorization header bears, in a time that does not depend on which it is."""
    scheme, _, presented = authorization.partition(" ")
    digest = hashlib.sha256(presented.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, key.digest) for key in keys]
    return keys[matches.index(True)] if scheme.lower() == "bearer" and any(matches) else None


def _lines(path: str | Path) -> list[tuple[int, str]]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
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


def _key_of_line(line: str, path: str | Path, number: int, requests_per_minute: int | None) -> ApiKey:
    key, *limit = line.split()
    digest = _DIGEST_LINE.fullmatch(key)
    if len(limit) > 1 or (limit and not (limit[0].isascii() and limit[0].isdigit() and int(limit[0]) > 0)):
        raise ConfigError(
            f"api_keys_file {path} line {number} must be a key, or a key and a number of requests a minute; fix the line"
        )
    if not key.isascii():
        raise ConfigError(
            f"api_keys_file {path} line {number} must be a key of ASCII characters, as HTTP headers are; make another one"
        )
    if not digest and len(key) < _MIN_KEY_CHARS:
        raise ConfigError(
            f"api_keys_file {path} line {number} must be a key of {_MIN_KEY_CHARS} characters or more; make a longer one"
        )
    return ApiKey(
        bytes.fromhex(digest.group(1)) if digest else hashlib.sha256(key.encode()).digest(),
        int(limit[0]) if limit else requests_per_minute,
    )
