"""A backend for the API that answers at once."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.encoding import decode_upload, encode
from selma_ray.serving.requests import ImageRequest

TOKEN_LIMIT = 30


class Recorder:
    """Answers at once and keeps what it was asked; scores an image by the colour that its seed gave it."""

    def __init__(self) -> None:
        self.requests: list[ImageRequest] = []
        self.scored: list[tuple[list[bytes], list[str]]] = []
        self.asked_questions: list[Any] = []
        self.error: Exception | None = None
        self.score_error: Exception | None = None
        self.stats: list[dict[str, Any]] = []

    async def generate(self, requests: Sequence[ImageRequest], file_format: Any) -> Images:
        self._note(requests)
        files = [encode(picture(request.seed), file_format) for request in requests]
        return Images(files, len(requests[0].prompt), TOKEN_LIMIT)

    async def stream(self, requests: Sequence[ImageRequest], file_format: Any) -> AsyncIterator[Drawn]:
        self._note(requests)
        for index, request in enumerate(requests):
            for preview in range(request.num_previews):
                yield Drawn(index, encode(picture(preview), file_format), preview)
            yield Drawn(index, encode(picture(request.seed), file_format), None, len(request.prompt), TOKEN_LIMIT)
            if self.score_error:
                raise self.score_error

    async def score(
        self, prompt: str, images: Sequence[bytes], metrics: Sequence[str], questions: Any = None
    ) -> dict[str, Any]:
        if self.score_error:
            raise self.score_error
        self.asked_questions.append(questions)
        if images:  # without any, it is asked whether there could be scores
            self.scored.append((list(images), list(metrics)))
        reds = [decode_upload(image, 10**6).getpixel((0, 0))[0] for image in images]  # type: ignore[index]
        scores = [dict.fromkeys(metrics, red / 255 if red else None) for red in reds]
        return {"judge": "red", "data": [{"scores": each, "questions": []} for each in scores]}

    async def check_ready(self) -> None:
        if self.error:
            raise self.error

    async def generator_stats(self) -> list[dict[str, Any]]:
        if self.error:
            raise self.error
        return self.stats

    def _note(self, requests: Sequence[ImageRequest]) -> None:
        if self.error:
            raise self.error
        self.requests += requests


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (red, 0, 0))
