"""POST /v1/images/generations: images at once, the best of several, or as server-sent events while they form."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from selma_ray.serving.backend import Backend, Drawn
from selma_ray.serving.bodies import DrawnCandidate, GeneratedImage, Generation, GenerationBody
from selma_ray.serving.encoding import OutputFormat, base64_of, reencode
from selma_ray.serving.errors import RequestError, error_body, internal_error
from selma_ray.serving.requests import ImageRequest

__all__ = ["draw", "event_stream"]

logger = logging.getLogger(__name__)


async def draw(
    backend: Backend, body: GenerationBody, requests: Sequence[ImageRequest], default_model: str, best_by: str | None
) -> Generation:
    """Draw the images of a body, or, where it asks for best_of, the best of them by the metric `best_by`."""
    output_format = body.output_format or "png"
    candidates = None
    if best_by is None:
        images = await backend.generate(requests, output_format)
        data = [
            GeneratedImage(b64_json=base64_of(image), seed=request.seed)
            for image, request in zip(images, requests, strict=True)
        ]
    else:
        data, candidates = await _draw_best(backend, body, requests, output_format, best_by)
    return Generation(
        created=int(time.time()),
        data=data,
        model=default_model if body.model is None else body.model,
        size=_size(requests[0]),
        output_format=output_format,
        candidates=candidates,
    )


async def _draw_best(
    backend: Backend, body: GenerationBody, requests: Sequence[ImageRequest], output_format: OutputFormat, metric: str
) -> tuple[list[GeneratedImage], list[DrawnCandidate]]:
    """Draw all, score them, keep the n best; of equal ones those with the lower seeds, and unreadable ones last."""
    # Scored without loss, whatever the client wants: the score is then the one that offline evaluation gives.
    images = await backend.generate(requests, "png")
    judged = await backend.score(body.prompt, images, [metric])
    scores = [entry["scores"] for entry in judged["data"]]
    candidates = [
        DrawnCandidate(seed=request.seed, scores=each) for request, each in zip(requests, scores, strict=True)
    ]

    def rank(index: int) -> tuple[float, int]:
        score = scores[index][metric]
        return (float("inf") if score is None else -score, index)

    chosen = sorted(range(len(requests)), key=rank)[: body.n or 1]
    files = await asyncio.gather(*(asyncio.to_thread(reencode, images[index], output_format) for index in chosen))
    data = [
        GeneratedImage(b64_json=base64_of(file), seed=requests[index].seed, scores=scores[index])
        for file, index in zip(files, chosen, strict=True)
    ]
    return data, candidates


async def event_stream(
    backend: Backend, requests: Sequence[ImageRequest], output_format: OutputFormat
) -> StreamingResponse:
    """Return a response of OpenAI's events; what is refused before the first event raises RequestError instead."""
    drawn = backend.stream(requests, output_format)
    first = await anext(drawn)
    return StreamingResponse(_events(first, drawn, requests, output_format), media_type="text/event-stream")


async def _events(
    first: Drawn, drawn: AsyncIterator[Drawn], requests: Sequence[ImageRequest], output_format: OutputFormat
) -> AsyncIterator[str]:
    try:
        yield _event(first, requests, output_format)
        async for each in drawn:
            yield _event(each, requests, output_format)
    except RequestError as error:
        yield _sse("error", {"type": "error", **error_body(error)})
    except Exception:
        logger.exception("a stream of images failed")
        yield _sse("error", {"type": "error", **error_body(internal_error())})


def _event(drawn: Drawn, requests: Sequence[ImageRequest], output_format: OutputFormat) -> str:
    request = requests[drawn.index]
    content: dict[str, Any] = {
        "b64_json": base64_of(drawn.image),
        "created_at": int(time.time()),
        "size": _size(request),
        "quality": "auto",
        "background": "opaque",
        "output_format": output_format,
        "image_index": drawn.index,
        "seed": request.seed,
    }
    if drawn.preview is None:
        return _sse("image_generation.completed", content)
    return _sse("image_generation.partial_image", content | {"partial_image_index": drawn.preview})


def _sse(event: str, content: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps({'type': event} | content)}\n\n"


def _size(request: ImageRequest) -> str:
    return f"{request.width_px}x{request.height_px}"
