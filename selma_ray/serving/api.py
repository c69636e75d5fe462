"""The HTTP API: a FastAPI application over whatever draws images and scores them."""

import base64
import binascii
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from selma_ray import __version__
from selma_ray.serving.bodies import (
    GeneratedImage,
    Generation,
    GenerationBody,
    Model,
    ModelList,
    Score,
    ScoreBody,
    image_requests,
)
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import OutputFormat
from selma_ray.serving.errors import RequestError, invalid_request
from selma_ray.serving.guards import LimitBody, RequireKey, SecureHeaders, error_response
from selma_ray.serving.requests import ImageRequest

__all__ = ["Backend", "build_app"]

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Whatever draws images and scores them; both raise RequestError."""

    async def generate(self, requests: Sequence[ImageRequest], output_format: OutputFormat) -> list[bytes]:
        """Return one encoded image a request."""
        ...

    async def score(self, prompt: str, image: bytes) -> dict[str, Any]:
        """Return the score of an encoded image: what bodies.Score holds, without the prompt."""
        ...


def build_app(backend: Backend, config: ServingConfig, model_name: str, key_digests: Sequence[bytes]) -> FastAPI:
    """Return the API around `backend`; `key_digests` is empty where only loopback is answered."""
    app = FastAPI(title="selma_ray", version=__version__, docs_url=None, redoc_url=None)
    _add_routes(app, backend, config, model_name)
    _add_error_handlers(app)
    app.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 1e6))
    app.add_middleware(RequireKey, digests=key_digests)
    app.add_middleware(SecureHeaders)
    return app


def _add_routes(app: FastAPI, backend: Backend, config: ServingConfig, model_name: str) -> None:
    started_s = int(time.time())

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the API answers."""
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the models that can be asked for."""
        return ModelList(data=[Model(id=model_name, created=started_s)])

    @app.post("/v1/images/generations")
    async def generations(body: GenerationBody) -> Generation:
        """Draw images."""
        if body.model not in (None, model_name):
            raise invalid_request(
                f"model must be {model_name!r}, got {body.model[:80]!r}", "model", "model_not_found", status=404
            )
        requests = image_requests(body, config)
        output_format = body.output_format or "png"
        images = await backend.generate(requests, output_format)
        return Generation(
            created=int(time.time()),
            data=[
                GeneratedImage(b64_json=base64.b64encode(image).decode(), seed=request.seed)
                for image, request in zip(images, requests, strict=True)
            ],
            model=model_name,
            size=f"{requests[0].width_px}x{requests[0].height_px}",
            output_format=output_format,
        )

    @app.post("/v1/scores")
    async def scores(body: ScoreBody) -> Score:
        """Score an image against a prompt."""
        if len(body.prompt) > config.max_prompt_chars:
            raise invalid_request(
                f"prompt must have at most {config.max_prompt_chars} characters", "prompt", "string_too_long"
            )
        return Score(prompt=body.prompt, **await backend.score(body.prompt, _decoded(body.image)))


def _decoded(text: str) -> bytes:
    """Return the bytes of base64 text, bare or in a data: URL."""
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise invalid_request("image must be a file in base64", "image", "invalid_image") from None


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_explained(error))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(
            RequestError(f"{request.method} {request.url.path}: {error.detail}", error.status_code, "unknown_url")
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(RequestError("the service failed to answer; its log says why", 500, "internal_error"))


def _explained(error: RequestValidationError) -> RequestError:
    """Return the first fault of a body as OpenAI's API words it: the parameter and the rule, never the whole input."""
    fault = error.errors()[0]
    param = ".".join(str(part) for part in fault["loc"][1:]) or None
    if fault["type"] == "json_invalid":
        return invalid_request("the body must be JSON", code="invalid_json")
    if fault["type"] == "extra_forbidden":
        return invalid_request(f"unknown parameter: {param}", param, "unknown_parameter")
    if fault["type"] == "missing":
        return invalid_request(f"missing required parameter: {param}", param, "missing_required_parameter")
    return invalid_request(f"{param or 'the body'}: {fault['msg']}", param)
