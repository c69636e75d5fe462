"""What stands before every route: the caller's key and its limit, the size of the body, headers, an answer to any fault."""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from selma_ray.serving.config import is_loopback
from selma_ray.serving.errors import (
    RequestError,
    error_body,
    internal_error,
    invalid_request,
    rate_limited,
    too_large,
    too_slow,
    unauthorized,
)
from selma_ray.serving.keys import ApiKey, Taken, find_key

__all__ = ["AnswerFaults", "AnswerHead", "LimitBody", "RequireKey", "SecureHeaders", "error_response"]

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Take = Callable[[bytes], Awaitable[Taken | None]]
"""Counts a use of a key, by its digest."""

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return a refusal as an HTTP response."""
    headers = dict(headers or {})
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error_body(error), error.status, headers)


class RequireKey:
    """Lets a request through that bears a key within its limit; without any keys, one from this machine to itself.

    `open_paths` are answered without a key, so that probes and the page that asks for a key can be loaded.
    """

    def __init__(
        self,
        app: App,
        keys: Sequence[ApiKey],
        take: Take,
        open_paths: Sequence[str],
        open_folders: tuple[str, ...] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._take = take
        self._open_paths = frozenset(open_paths)
        self._open_folders = open_folders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or answer 401 or 429 before its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._keys:
            await self._pass_on(_refusal_of_strangers(scope, headers), scope, receive, send)
        elif scope["path"] in self._open_paths or scope["path"].startswith(self._open_folders):
            await self._app(scope, receive, send)
        else:
            await self._with_key(find_key(self._keys, headers.get("authorization", "")), scope, receive, send)

    async def _with_key(self, key: ApiKey | None, scope: Scope, receive: Receive, send: Send) -> None:
        if key is None:
            refusal = unauthorized("a valid key is required: send the header Authorization: Bearer KEY")
            await self._pass_on(refusal, scope, receive, send)
            return
        taken = None if key.requests_per_minute is None else await self._take(key.digest)
        if taken is None:
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(taken.headers)
            await send(message)

        limited = rate_limited(key.requests_per_minute or 0, math.ceil(taken.wait_s)) if taken.wait_s else None
        await self._pass_on(limited, scope, receive, send_with_limits)

    async def _pass_on(self, refusal: RequestError | None, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)


def _refusal_of_strangers(scope: Scope, headers: Headers) -> RequestError | None:
    """Refuse who is not on this machine, and browsers that were sent here under another name (DNS rebinding)."""
    # The service may have been put on another address than its configuration says, so the peer is checked too.
    peer = scope.get("client")
    if not peer or not is_loopback(peer[0]):
        return (
            None if scope["path"] == "/healthz" else unauthorized("without api_keys_file only this machine is answered")
        )
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name and not is_loopback(name):
        return invalid_request(
            "without api_keys_file the Host header must name this machine, such as 127.0.0.1 or localhost",
            code="unknown_host",
        )
    return None


class LimitBody:
    """Reads the whole body before the application does; answers 413 as soon as it is too long, 408 when it is too slow."""

    def __init__(self, app: App, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body at hand."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        too_long = declared.isdigit() and int(declared) > self._max_bytes
        try:
            body = None if too_long else await asyncio.wait_for(self._read(receive), self._timeout_s)
        except TimeoutError:
            await error_response(too_slow(self._timeout_s))(scope, receive, send)
            return
        if body is None:
            refusal = too_large(f"the body must have at most {self._max_bytes} bytes")
            await error_response(refusal)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return bytes(body)


class AnswerFaults:
    """Answers 500 in the shape of all errors where the application fails, and logs why."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; a response that has begun is broken off, so that nobody takes it for whole."""
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            if begun or scope["type"] != "http":
                raise
            logger.exception("%s %s failed (%s)", scope["method"], scope["path"], scope.get("request_id"))
            await error_response(internal_error())(scope, receive, send)


class AnswerHead:
    """Answers HEAD as GET is answered, without the body; probes and link checkers ask so."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = "GET"
        await self._app(scope, receive, send_headers)


class SecureHeaders:
    """Adds to every response that it is data, to be neither stored, sniffed nor framed; a page may say otherwise.

    Each answer has a name of its own, x-request-id, which is also in the log of a fault.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        scope["request_id"] = request_id = f"req_{secrets.token_hex(12)}"

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_secured)
