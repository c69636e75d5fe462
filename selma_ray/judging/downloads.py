"""Published files, downloaded once into the user's cache by pooch, in bounds and checked by digest."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from selma_ray.errors import JudgeError, first_line

__all__ = ["SuiteFile", "fetch"]

_MAX_BYTES = 64 << 20
_TIMEOUT_S = 60
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class SuiteFile:
    """A published file; `sha256` is None where no digest is known."""

    name: str
    url: str
    sha256: str | None = None
    max_bytes: int = _MAX_BYTES


def fetch(file: SuiteFile, folder: Path, suite: str) -> Path:
    """Return the file's place in `folder`, downloading it where it is not there; a file of another digest is refused."""
    import pooch

    path = folder / file.name
    if path.is_file():
        _check_digest(file, path, suite)
        return path
    pooch.get_logger().setLevel(logging.WARNING)  # it would print the place of every file
    digest = file.sha256 and f"sha256:{file.sha256}"
    try:
        pooch.retrieve(file.url, digest, file.name, folder, downloader=_BoundedDownloader(file.max_bytes))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: too large, or another digest
        raise JudgeError(
            f"evaluation.suite {suite} needs {file.name}, and {file.url} cannot be downloaded ({first_line(error)}); "
            f"on a closed network put the published file into {folder}"
        ) from None
    return path


def _check_digest(file: SuiteFile, path: Path, suite: str) -> None:
    import pooch

    digest = pooch.file_hash(str(path), alg="sha256")
    if file.sha256 is not None and digest != file.sha256:
        raise JudgeError(
            f"evaluation.suite {suite}: {path} has sha256 {digest[:12]}…, expected {file.sha256[:12]}…; it was changed or cut off: "
            "delete it, or get the published version"
        )


class _BoundedDownloader:
    """pooch's downloader, ended by a ValueError at the first byte beyond the bound."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        from pooch import HTTPDownloader

        download = HTTPDownloader(timeout=_TIMEOUT_S, chunk_size=_READ_BYTES)
        with Path(output_file).open("wb") as stream:
            download(url, _BoundedWriter(stream, self._max_bytes), pooch)


class _BoundedWriter:
    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    def write(self, block: bytes) -> int:
        if self._stream.tell() + len(block) > self._max_bytes:
            raise ValueError(f"larger than {self._max_bytes} bytes")
        return self._stream.write(block)

    def flush(self) -> None:
        self._stream.flush()
