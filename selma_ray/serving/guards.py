"""What stands before every route: the caller's key, the size of the body, headers for browsers."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from selma_ray.serving.config import is_loopback
from selma_ray.serving.errors import RequestError, error_body, too_large, unauthorized
from selma_ray.serving.keys import accepts

__all__ = ["LimitBody", "RequireKey", "SecureHeaders", "error_response"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/healthz",)


def error_response(error: RequestError) -> JSONResponse:
    """Return a refusal as an HTTP response."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error_body(error), error.status, headers)


class RequireKey:
    """Lets a request through that bears a key; without any keys, one whose peer is on this machine."""

    def __init__(self, app: App, digests: Sequence[bytes]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or answer 401 before its body is read."""
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        if not self._digests:
            # The service may have been put on another address than its configuration says, so the peer is checked too.
            peer = scope.get("client")
            return (
                None
                if peer and is_loopback(peer[0])
                else unauthorized("without api_keys_file only this machine is answered")
            )
        if accepts(self._digests, Headers(scope=scope).get("authorization", "")):
            return None
        return unauthorized("a valid key is required: send the header Authorization: Bearer KEY")


class LimitBody:
    """Reads the whole body before the application does, and answers 413 as soon as it is longer than allowed."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body at hand."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body = None if declared.isdigit() and int(declared) > self._max_bytes else await self._read(receive)
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


class SecureHeaders:
    """Adds to every response that it is data, to be neither stored, sniffed nor framed."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "DENY"
                headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
                headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, send_secured)
