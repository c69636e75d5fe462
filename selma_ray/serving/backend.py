"""What the HTTP API stands before: whatever draws images and scores them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selma_ray.serving.encoding import FileFormat
from selma_ray.serving.requests import ImageRequest

__all__ = ["Backend", "Drawn", "Images"]


@dataclass(frozen=True)
class Drawn:
    """An encoded image on its way to a client: a preview by its number, or the finished image."""

    index: int
    """Which of the call's requests it is of."""
    image: bytes
    preview: int | None = None
    prompt_tokens: int = 0
    """Tokens of the prompt, which may be more than `token_limit`."""
    token_limit: int = 0
    """Tokens that the model sees."""


@dataclass(frozen=True)
class Images:
    """Encoded images of one prompt."""

    files: list[bytes]
    prompt_tokens: int
    """Tokens of the prompt, which may be more than `token_limit`."""
    token_limit: int
    """Tokens that the model sees."""


class Backend(Protocol):
    """Draws and scores; its methods raise RequestError."""

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        """Return one encoded image a request."""
        ...

    def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        """Yield previews and finished images as they come."""
        ...

    async def score(
        self,
        prompt: str,
        images: Sequence[bytes],
        metrics: Sequence[str],
        questions: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return what bodies.Scores holds about encoded images, without the prompt.

        `questions` have the fields of bodies.AskedQuestion; default: the prompt's own.
        """
        ...

    async def check_ready(self) -> None:
        """Raise RequestError (503) unless images can be drawn."""
        ...

    async def generator_stats(self) -> list[dict[str, Any]]:
        """Return the counts of each generator replica: the fields of EngineStats, start_s and swap_s."""
        ...
