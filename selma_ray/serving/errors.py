"""Refusals of a request, each with its HTTP status, in the shape of OpenAI's errors."""

import math
from collections.abc import Sequence
from typing import Any

from selma_ray.errors import ServingError

__all__ = [
    "RequestError",
    "content_refused",
    "error_body",
    "failed_image",
    "internal_error",
    "invalid_request",
    "metric_not_served",
    "queue_full",
    "queue_too_long",
    "rate_limited",
    "shutting_down",
    "timed_out",
    "too_large",
    "too_large_for_memory",
    "too_slow",
    "too_slow_to_draw",
    "unauthorized",
    "unavailable",
]

_SHOWN_CHARS = 80
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(ServingError):
    """A request that is refused; carries what the HTTP answer needs, also from one replica to another."""

    def __init__(
        self, message: str, status: int, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.retry_after_s = (
            message,
            status,
            code,
            param,
            retry_after_s,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.status, self.code, self.param, self.retry_after_s)


def invalid_request(
    message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
) -> RequestError:
    """Return the refusal of a request that must be changed before it can be answered."""
    return RequestError(message, status, code, param)


def metric_not_served(param: str, metric: str, served: Sequence[str]) -> RequestError:
    """Return the refusal of a score that nothing here gives."""
    if not served:
        return invalid_request("scores are not served here; set evaluator_replicas", param, "scores_not_served", 404)
    return invalid_request(
        f"{param}: {metric[:_SHOWN_CHARS]!r} is not served here; served are {', '.join(served)}",
        param,
        "metric_not_served",
    )


def too_large(message: str, param: str | None = None) -> RequestError:
    """Return the refusal of a body or an image beyond its bound."""
    return RequestError(message, 413, "content_too_large", param)


def too_slow(timeout_s: float) -> RequestError:
    """Return the refusal of a body that did not arrive in time."""
    return RequestError(f"the body must arrive within {timeout_s:g} s", 408, "body_too_slow")


def unauthorized(message: str) -> RequestError:
    """Return the refusal of a request without a valid key."""
    return RequestError(message, 401, "invalid_api_key")


def content_refused(reason: str, param: str | None = None) -> RequestError:
    """Return the refusal of a prompt or an image that a content filter or a safety checker does not let through."""
    return invalid_request(f"{reason}; change the prompt or take another seed", param, "content_policy_violation")


def failed_image() -> RequestError:
    """Return the answer to a request whose image came out unusable; why is for the operator, in the log."""
    return RequestError("the model drew nothing usable; take another seed or fewer steps", 500, "image_failed")


def too_large_for_memory(size_px: tuple[int, int]) -> RequestError:
    """Return the answer to a request of which not even one image, height by width, fits the memory."""
    height_px, width_px = size_px
    return RequestError(
        f"an image of {width_px}x{height_px} does not fit the memory of this service; ask for a smaller size",
        500,
        "out_of_memory",
        "size",
    )


def queue_too_long(estimate_s: float, timeout_s: float) -> RequestError:
    """Return the refusal of a request that would not be answered in time behind what was accepted before it."""
    wait_s = max(1, math.ceil(estimate_s - timeout_s))
    return RequestError(
        f"the answer would take about {estimate_s:.0f} s behind what is being drawn, more than the {timeout_s:g} s allowed here; "
        f"try again in {wait_s} s",
        429,
        "queue_too_long",
        retry_after_s=wait_s,
    )


def too_slow_to_draw(estimate_s: float, timeout_s: float) -> RequestError:
    """Return the refusal of a request that would not be answered in time even by an idle service."""
    return invalid_request(
        f"the images would take about {estimate_s:.0f} s to draw, more than the {timeout_s:g} s allowed here; "
        "ask for a smaller size, fewer steps or fewer images",
        "size",
        "too_slow_to_draw",
    )


def queue_full(retry_after_s: int) -> RequestError:
    """Return the refusal of a request that found the queue full."""
    return RequestError("the queue is full; try again later", 429, "queue_full", retry_after_s=retry_after_s)


def rate_limited(requests_per_minute: int, retry_after_s: int) -> RequestError:
    """Return the refusal of a request whose key has been used too often."""
    return RequestError(
        f"this key may make {requests_per_minute} requests a minute; try again later",
        429,
        "rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def internal_error() -> RequestError:
    """Return the answer to a request that met a fault of ours; nothing of the fault is shown."""
    return RequestError("the service failed to answer; its log says why", 500, "internal_error")


def unavailable(what: str) -> RequestError:
    """Return the answer while a part of the service is down."""
    return RequestError(
        f"the {what} is not available; try again later", 503, f"{what.replace(' ', '_')}_unavailable", retry_after_s=5
    )


def shutting_down() -> RequestError:
    """Return the answer of a service that is about to end."""
    return RequestError("the service is shutting down; try again later", 503, "shutting_down", retry_after_s=5)


def timed_out(timeout_s: float) -> RequestError:
    """Return the answer to a request that took longer than the service allows."""
    return RequestError(f"the request took longer than {timeout_s:g} s; ask for fewer images or steps", 504, "timeout")


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the JSON body of a refusal."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
