"""The service in one process, without Ray: the real generator and scorer behind the real API, on a port of this machine."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from selma_ray.serving.backend import Drawn, Images
from selma_ray.serving.encoding import FileFormat
from selma_ray.serving.evaluator import Scorer, answer_of, prepare
from selma_ray.serving.generator import Generator
from selma_ray.serving.requests import ImageRequest

__all__ = ["LocalBackend", "served"]


class LocalBackend:
    """A generator and a scorer called directly, where the service calls them through Ray Serve."""

    def __init__(self, generator: Generator, scorer: Scorer) -> None:
        self._generator = generator
        self._scorer = scorer

    async def generate(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> Images:
        return await self._generator.generate(requests, file_format)

    def stream(self, requests: Sequence[ImageRequest], file_format: FileFormat) -> AsyncIterator[Drawn]:
        return self._generator.stream(requests, file_format)

    async def score(
        self, prompt: str, images: Sequence[bytes], metrics: Sequence[str], questions: Any = None
    ) -> dict[str, Any]:
        asked = prepare(self._scorer, prompt, images, metrics, 10**6, questions)
        return answer_of(self._scorer, asked, await asyncio.to_thread(self._scorer.score, asked))

    async def check_ready(self) -> None:
        self._generator.check_health()

    async def generator_stats(self) -> list[dict[str, Any]]:
        return [self._generator.stats()]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port until the block ends; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
