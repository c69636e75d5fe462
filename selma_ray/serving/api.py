"""The HTTP API: a FastAPI application over whatever draws images and scores them."""

import asyncio
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from selma_ray import __version__
from selma_ray.serving.backend import Backend
from selma_ray.serving.bodies import (
    EditBody,
    Generation,
    GenerationBody,
    Model,
    ModelList,
    ScoreBody,
    Scores,
)
from selma_ray.serving.catalogue import Catalogue, Entry
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.description import describe
from selma_ray.serving.draining import Gate, KeepGate
from selma_ray.serving.edits import FILES, edit_requests
from selma_ray.serving.encoding import FileFormat, bytes_of_base64
from selma_ray.serving.errors import RequestError, invalid_request
from selma_ray.serving.forms import form_body_of, read_form
from selma_ray.serving.generation import Sign, Wanted, draw, event_stream
from selma_ray.serving.guards import AnswerFaults, AnswerHead, LimitBody, RequireKey, SecureHeaders, error_response
from selma_ray.serving.idempotency import RepeatAnswers
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.links import FILES_PATH, ImageLinks
from selma_ray.serving.live_names import LiveNames
from selma_ray.serving.metrics import MeasureRequests, Metrics, engines_exposition
from selma_ray.serving.page import PAGE_PATHS, add_page
from selma_ray.serving.parsing import read_body, request_body_of
from selma_ray.serving.peers import Peers
from selma_ray.serving.reading import image_requests, wanted_metrics, warnings_of
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames
from selma_ray.serving.shared import LocalState

__all__ = ["build_app"]

_PROBES = ("/healthz", "/readyz")
_TO_THE_END = ("/healthz", "/metrics")
_BODY_TIMEOUT_S = 30
_EXPOSED_HEADERS = (
    "Retry-After", "x-request-id", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
)  # fmt: skip
_EVENT = {
    "type": "object",
    "description": "A server-sent event: its name, and JSON.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def build_app(
    backend: Backend,
    config: ServingConfig,
    names: ModelNames,
    keys: Sequence[ApiKey],
    gate: Gate | None = None,
    *,
    others: Mapping[str, Entry] | None = None,
    peers: Peers | None = None,
    sign: Sign | None = None,
) -> FastAPI:
    """Return the API around `backend`; `keys` is empty where only loopback is answered, and closing `gate` ends it.

    `others` are runs beside the service's own, by name; `peers` is what replicas have in common, where there are several; `sign` is
    applied to each finished image's file.
    """
    peers = peers or Peers(LocalState(config, keys))
    metrics = peers.metrics
    catalogue = Catalogue({"": Entry(names, config), **(others or {})})
    app = FastAPI(title="selma_ray", version=__version__, docs_url=None, redoc_url=None)
    _add_probes(app, backend, peers)
    _add_image_routes(app, backend, catalogue, peers, sign)
    _add_score_route(app, backend, config, metrics)
    add_page(app)
    _add_error_handlers(app)
    describe(app, config)
    # The last added is the outermost.
    app.add_middleware(RepeatAnswers, store=peers.state)
    app.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 1e6), timeout_s=_BODY_TIMEOUT_S)
    app.add_middleware(
        RequireKey,
        keys=keys,
        take=peers.state.take,
        open_paths=(*_PROBES, *PAGE_PATHS),
        open_folders=(FILES_PATH,),
    )
    app.add_middleware(AnswerHead)
    app.add_middleware(AnswerFaults)
    app.add_middleware(KeepGate, gate=gate or Gate(), open_paths=_TO_THE_END)
    app.add_middleware(MeasureRequests, metrics=metrics)
    app.add_middleware(SecureHeaders)
    if config.cors_origins:
        # The outermost: browsers ask whether they may ask without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
            max_age=600,
        )
    return app


def _add_probes(app: FastAPI, backend: Backend, peers: Peers) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the API answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Tell that images can be drawn."""
        await backend.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Report counts in Prometheus' text format; those of the generator are left out while it is down."""
        try:
            stats = await backend.generator_stats()
        except RequestError:
            stats = []
        return Response(await peers.exposition() + engines_exposition(stats), media_type=Metrics.CONTENT_TYPE)


def _add_model_routes(app: FastAPI, live_names: LiveNames, started_s: int) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the models that can be asked for."""
        known = await live_names.known()
        return ModelList(data=[Model(id=name, created=started_s, kind=known.kind(name)) for name in known.all()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        """Describe one of them."""
        known = await live_names.known()
        if name not in known.all():
            raise known.unknown(name)
        return Model(id=name, created=started_s, kind=known.kind(name))


def _add_image_routes(app: FastAPI, backend: Backend, catalogue: Catalogue, peers: Peers, sign: Sign | None) -> None:
    config, metrics = catalogue.own.config, peers.metrics
    live_names = LiveNames(catalogue, backend)
    _add_model_routes(app, live_names, peers.started_s)
    links = ImageLinks(config, peers.state.keep_image, peers.state.image, peers.secret)

    @app.get(FILES_PATH + "{name}", response_class=Response)
    async def linked(name: str, expires: str = "", signature: str = "") -> Response:
        """Return an image that a link names."""
        return await links.answer(name, expires, signature)

    async def answered(request: Request, body: GenerationBody, wanted: Wanted) -> Any:
        if body.stream:
            return await event_stream(backend, wanted)

        async def link(image: bytes) -> str:
            return await links.keep(image, wanted.file_format.kind, str(request.base_url))

        generation = await draw(backend, wanted, link if body.response_format == "url" else None)
        metrics.images.inc(len(generation.candidates or generation.data))
        for candidate in generation.candidates or ():
            metrics.count_scores(candidate.scores)
        return generation

    @app.post(
        "/v1/images/generations",
        response_model=Generation,
        responses=_STREAMED,
        openapi_extra=request_body_of(GenerationBody),
    )
    async def generations(request: Request) -> Any:
        """Draw images."""
        body = await read_body(request, GenerationBody)
        entry, requests = await live_names.read(partial(_read, body))
        return await answered(request, body, _wanted(body, entry.config, catalogue.own.names, requests, sign))

    @app.post("/v1/images/edits", response_model=Generation, responses=_STREAMED, openapi_extra=form_body_of(EditBody))
    async def edits(request: Request) -> Any:
        """Change an image, as a whole or where its mask is transparent."""
        form = await read_form(request, FILES)
        body = form.validated(EditBody)
        entry, undecided = await live_names.read(partial(_read, body))
        requests, warnings = await asyncio.to_thread(edit_requests, body, undecided, form.files, entry.config)
        wanted = _wanted(body, entry.config, catalogue.own.names, requests, sign)
        return await answered(
            request, body, replace(wanted, event="image_edit", warnings=[*warnings, *wanted.warnings])
        )


def _add_score_route(app: FastAPI, backend: Backend, config: ServingConfig, metrics: Metrics) -> None:
    @app.post("/v1/scores", openapi_extra=request_body_of(ScoreBody))
    async def scores(request: Request) -> Scores:
        """Score images against a prompt."""
        body = await read_body(request, ScoreBody)
        if len(body.prompt) > config.max_prompt_chars:
            raise invalid_request(
                f"prompt must have at most {config.max_prompt_chars} characters", "prompt", "string_too_long"
            )
        metrics_wanted = wanted_metrics(body.metrics, config, "metrics")
        questions = None if body.questions is None else [each.model_dump() for each in body.questions]
        judged = await backend.score(body.prompt, _uploads(body, config), metrics_wanted, questions)
        answer = Scores(prompt=body.prompt, **judged)
        for image in answer.data:
            metrics.count_scores(image.scores)
        return answer


def _read(body: GenerationBody, known: Catalogue) -> tuple[Entry, list[ImageRequest]]:
    """Return which run a body asks for, and what of it; raises RequestError where it leaves the service's bounds."""
    entry = known.entry_of(body.model)
    return entry, image_requests(body, entry.config, entry.names, entry.run)


def _wanted(
    body: GenerationBody,
    config: ServingConfig,
    names: ModelNames,
    requests: Sequence[ImageRequest],
    sign: Sign | None,
) -> Wanted:
    """Return what a body asks for; raises RequestError where it leaves the service's bounds."""
    best_by = None
    if body.best_of is not None:
        (best_by,) = wanted_metrics(body.metric and [body.metric], config, "metric")
    return Wanted(
        requests=requests,
        count=body.n or 1,
        model=names.merged if body.model is None else body.model,
        file_format=FileFormat(
            body.output_format or "png", 95 if body.output_compression is None else body.output_compression
        ),
        quality=body.quality or "auto",
        safety_identifier=body.safety_identifier or body.user or None,
        warnings=warnings_of(body, config),
        best_by=best_by,
        sign=sign,
        questions=None if body.questions is None else [each.model_dump() for each in body.questions],
    )


def _uploads(body: ScoreBody, config: ServingConfig) -> list[bytes]:
    if (body.image is None) == (body.images is None):
        raise invalid_request("give either image or images", "image")
    if body.image is not None:
        return [bytes_of_base64(body.image, "image")]
    images = body.images or []
    if len(images) > config.max_images:
        raise invalid_request(f"images must be at most {config.max_images}, got {len(images)}", "images")
    return [bytes_of_base64(image, "images") for image in images]


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        code = "unknown_url" if error.status_code in (404, 405) else "invalid_body"
        asked = f"{request.method} {request.url.path[:200]}"
        message = (
            f"{asked} is not served here{_nearest(request)}" if code == "unknown_url" else f"{asked}: {error.detail}"
        )
        return error_response(RequestError(message, error.status_code, code), error.headers)


def _nearest(request: Request) -> str:
    """Return which route was meant, where one is near: clients are often given an address without /v1."""
    routes = {route.path: sorted(route.methods or ()) for route in request.app.routes if isinstance(route, Route)}
    path = request.url.path[:200]
    if path in routes:
        return f"; send {' or '.join(routes[path])}"
    nearest = difflib.get_close_matches(path, [each for each in routes if "{" not in each], n=1, cutoff=0.75)
    return f"; did you mean {nearest[0]}?" if nearest else ""
