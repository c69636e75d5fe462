"""What POST /v1/images/generations and /edits answer: images at once, the best of several, or as server-sent events while they form."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

from selma_ray.serving.backend import Backend, Drawn
from selma_ray.serving.bodies import DrawnCandidate, GeneratedImage, Generation, Quality, Usage
from selma_ray.serving.encoding import PNG, FileFormat, OutputFormat, base64_of, reencode
from selma_ray.serving.errors import RequestError, error_body, internal_error
from selma_ray.serving.reading import token_warnings
from selma_ray.serving.requests import ImageRequest

__all__ = ["Sign", "Wanted", "draw", "event_stream"]

logger = logging.getLogger(__name__)


Sign = Callable[[bytes, OutputFormat, bool], bytes]
"""Returns a finished image's file with a claim of where it comes from, told its format and whether it is an image that was changed."""


@dataclass(frozen=True)
class Wanted:
    """What a client has asked for, read and within bounds."""

    requests: Sequence[ImageRequest]
    count: int
    """Images to return."""
    model: str | dict[str, float]
    file_format: FileFormat
    quality: Quality = "auto"
    safety_identifier: str | None = None
    warnings: Sequence[str] = ()
    best_by: str | None = None
    """The metric by which the best are chosen, where more are drawn than are returned."""
    questions: Sequence[Mapping[str, Any]] | None = None
    """What the judge is asked then; default: the prompt's own."""
    event: str = "image_generation"
    """What the events of a stream are called by."""
    sign: Sign | None = None
    """Applied to each finished image's file."""

    def usage(self, prompt_tokens: int) -> Usage:
        """Return what the request took."""
        return Usage(
            input_tokens=prompt_tokens,
            input_tokens_details={"text_tokens": prompt_tokens, "image_tokens": 0},
            total_tokens=prompt_tokens,
            image_steps=sum(request.steps_to_take for request in self.requests),
        )


Link = Callable[[bytes], Awaitable[str]]
"""Stores an image's file and returns its link."""


async def draw(backend: Backend, wanted: Wanted, link: Link | None) -> Generation:
    """Draw the images that are wanted, or, where there is a metric to choose by, the best of them."""
    candidates = None
    if wanted.best_by is None:
        images = await backend.generate(wanted.requests, wanted.file_format)
        data = [
            await _answered(image, request, wanted, link)
            for image, request in zip(images.files, wanted.requests, strict=True)
        ]
    else:
        # Without images: a prompt that cannot be judged is refused before anything is drawn.
        await backend.score(wanted.requests[0].prompt, [], [wanted.best_by], wanted.questions)
        # Scored without loss, whatever the client wants: the score is then the one that offline evaluation gives.
        images = await backend.generate(wanted.requests, PNG)
        data, candidates = await _best(backend, wanted, wanted.best_by, images.files, link)
    return Generation(
        created=int(time.time()),
        data=data,
        model=wanted.model,
        size=_size(wanted.requests[0]),
        output_format=wanted.file_format.kind,
        quality=wanted.quality,
        safety_identifier=wanted.safety_identifier,
        usage=wanted.usage(images.prompt_tokens),
        warnings=[*wanted.warnings, *token_warnings(images.prompt_tokens, images.token_limit)],
        candidates=candidates,
    )


async def _best(
    backend: Backend, wanted: Wanted, metric: str, images: Sequence[bytes], link: Link | None
) -> tuple[list[GeneratedImage], list[DrawnCandidate]]:
    """Score all and keep the best; of equal ones those with the lower seeds, and unreadable ones last."""
    requests = wanted.requests
    judged = await backend.score(requests[0].prompt, images, [metric], wanted.questions)
    scores = [entry["scores"] for entry in judged["data"]]
    candidates = [
        DrawnCandidate(seed=request.seed, scores=each) for request, each in zip(requests, scores, strict=True)
    ]

    def rank(index: int) -> tuple[float, int]:
        score = scores[index][metric]
        return (float("inf") if score is None else -score, index)

    chosen = sorted(range(len(requests)), key=rank)[: wanted.count]
    files = await asyncio.gather(*(asyncio.to_thread(reencode, images[index], wanted.file_format) for index in chosen))
    data = [
        await _answered(file, requests[index], wanted, link, scores[index])
        for file, index in zip(files, chosen, strict=True)
    ]
    return data, candidates


async def _answered(
    file: bytes,
    request: ImageRequest,
    wanted: Wanted,
    link: Link | None,
    scores: dict[str, float | None] | None = None,
) -> GeneratedImage:
    """Return an image as its link, where links are wanted, or in base64."""
    file = await _signed(file, request, wanted)
    if link is not None:
        return GeneratedImage(url=await link(file), seed=request.seed, scores=scores)
    return GeneratedImage(b64_json=base64_of(file), seed=request.seed, scores=scores)


async def _signed(file: bytes, request: ImageRequest, wanted: Wanted) -> bytes:
    if wanted.sign is None:
        return file
    return await asyncio.to_thread(wanted.sign, file, wanted.file_format.kind, request.source is not None)


async def event_stream(backend: Backend, wanted: Wanted) -> StreamingResponse:
    """Return a response of OpenAI's events; what is refused before the first event raises RequestError instead."""
    drawn = backend.stream(wanted.requests, wanted.file_format)
    first = await anext(drawn)
    # Proxies such as nginx would hold each event back until the next one comes.
    headers = {"X-Accel-Buffering": "no"}
    return StreamingResponse(_events(first, drawn, wanted), media_type="text/event-stream", headers=headers)


async def _events(first: Drawn, drawn: AsyncIterator[Drawn], wanted: Wanted) -> AsyncIterator[str]:
    try:
        yield await _event(first, wanted)
        async for each in drawn:
            yield await _event(each, wanted)
    except RequestError as error:
        yield _sse("error", {"type": "error", **error_body(error)})
    except Exception:
        logger.exception("a stream of images failed")
        yield _sse("error", {"type": "error", **error_body(internal_error())})


async def _event(drawn: Drawn, wanted: Wanted) -> str:
    request = wanted.requests[drawn.index]
    file = drawn.image if drawn.preview is not None else await _signed(drawn.image, request, wanted)
    content: dict[str, Any] = {
        "b64_json": base64_of(file),
        "created_at": int(time.time()),
        "size": _size(request),
        "quality": wanted.quality,
        "background": "opaque",
        "output_format": wanted.file_format.kind,
        "image_index": drawn.index,
        "seed": request.seed,
    }
    if drawn.preview is not None:
        return _sse(f"{wanted.event}.partial_image", content | {"partial_image_index": drawn.preview})
    content["usage"] = wanted.usage(drawn.prompt_tokens).model_dump()
    content["warnings"] = [*wanted.warnings, *token_warnings(drawn.prompt_tokens, drawn.token_limit)]
    return _sse(f"{wanted.event}.completed", content)


def _sse(event: str, content: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps({'type': event} | content)}\n\n"


def _size(request: ImageRequest) -> str:
    return f"{request.width_px}x{request.height_px}"
