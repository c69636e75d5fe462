"""The HTTP API: a FastAPI application over whatever draws images and scores them."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from selma_ray import __version__
from selma_ray.serving.backend import Backend
from selma_ray.serving.bodies import (
    Generation,
    GenerationBody,
    Model,
    ModelList,
    ScoreBody,
    Scores,
    image_requests,
    wanted_metrics,
)
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import bytes_of_base64
from selma_ray.serving.errors import RequestError, invalid_request
from selma_ray.serving.generation import draw, event_stream
from selma_ray.serving.guards import AnswerFaults, LimitBody, RequireKey, SecureHeaders, error_response
from selma_ray.serving.keys import ApiKey
from selma_ray.serving.metrics import MeasureRequests, Metrics
from selma_ray.serving.page import PAGE_PATHS, add_page
from selma_ray.serving.served import ModelNames

__all__ = ["build_app"]

_PROBES = ("/healthz", "/readyz")
_BODY_TIMEOUT_S = 30
_EVENT = {
    "type": "object",
    "description": "A server-sent event: its name, and JSON.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
_REFUSED = (400, 401, 404, 408, 413, 422, 429, 500, 503, 504)


def build_app(backend: Backend, config: ServingConfig, names: ModelNames, keys: Sequence[ApiKey]) -> FastAPI:
    """Return the API around `backend`; `keys` is empty where only loopback is answered."""
    metrics = Metrics()
    app = FastAPI(title="selma_ray", version=__version__, docs_url=None, redoc_url=None)
    _add_probes(app, backend, metrics)
    _add_routes(app, backend, config, names, metrics)
    add_page(app)
    _add_error_handlers(app)
    _describe_errors(app)
    # The last added is the outermost.
    app.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 1e6), timeout_s=_BODY_TIMEOUT_S)
    app.add_middleware(RequireKey, keys=keys, open_paths=(*_PROBES, *PAGE_PATHS))
    app.add_middleware(AnswerFaults)
    app.add_middleware(MeasureRequests, metrics=metrics)
    app.add_middleware(SecureHeaders)
    return app


def _add_probes(app: FastAPI, backend: Backend, metrics: Metrics) -> None:
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
        return Response(metrics.exposition(stats), media_type=metrics.CONTENT_TYPE)


def _add_routes(app: FastAPI, backend: Backend, config: ServingConfig, names: ModelNames, metrics: Metrics) -> None:
    started_s = int(time.time())

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the models that can be asked for."""
        return ModelList(data=[Model(id=name, created=started_s, kind=names.kind(name)) for name in names.all()])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        """Describe one of them."""
        if name not in names.all():
            raise names.unknown(name)
        return Model(id=name, created=started_s, kind=names.kind(name))

    @app.post(
        "/v1/images/generations",
        response_model=Generation,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}},
    )
    async def generations(body: GenerationBody) -> Any:
        """Draw images."""
        requests = image_requests(body, config, names)
        if body.stream:
            return await event_stream(backend, requests, body.output_format or "png")
        best_by = None
        if body.best_of is not None:
            (best_by,) = wanted_metrics(body.metric and [body.metric], config, "metric")
        generation = await draw(backend, body, requests, names.merged, best_by)
        metrics.images.inc(len(generation.candidates or generation.data))
        for candidate in generation.candidates or ():
            metrics.count_scores(candidate.scores)
        return generation

    @app.post("/v1/scores")
    async def scores(body: ScoreBody) -> Scores:
        """Score images against a prompt."""
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

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_explained(error))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        code = "unknown_url" if error.status_code in (404, 405) else "invalid_body"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return error_response(RequestError(message, error.status_code, code), error.headers)


def _explained(error: RequestValidationError) -> RequestError:
    """Return the first fault of a body as OpenAI's API words it: the parameter and the rule, never the whole input."""
    fault = error.errors()[0]
    param = str(fault["loc"][1])[:80] if len(fault["loc"]) > 1 and isinstance(fault["loc"][1], str) else None
    if fault["type"] == "json_invalid":
        return invalid_request("the body must be JSON", code="invalid_json")
    if fault["type"] == "extra_forbidden":
        return invalid_request(f"unknown parameter: {param}", param, "unknown_parameter")
    if fault["type"] == "missing":
        return invalid_request(f"missing required parameter: {param}", param, "missing_required_parameter")
    return invalid_request(f"{param or 'the body'}: {fault['msg']}", param)


def _describe_errors(app: FastAPI) -> None:
    """Write into the OpenAPI description how refusals look."""
    written = app.openapi

    def described() -> dict[str, Any]:
        """Return the description with an Error of OpenAI's shape under every status that refuses."""
        schema = written()
        error = {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]}, "code": {"type": "string"},
        }}  # fmt: skip
        schema["components"]["schemas"]["Error"] = {
            "type": "object",
            "required": ["error"],
            "properties": {"error": error},
        }
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for operations in schema["paths"].values():
            for operation in operations.values():
                for status in _REFUSED:
                    operation["responses"][str(status)] = {"description": "Refused", "content": content}
        return schema

    app.openapi = described  # type: ignore[method-assign]
