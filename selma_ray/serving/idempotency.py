"""Requests that are sent again with the same Idempotency-Key get the first one's answer, and nothing is drawn twice."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from selma_ray.serving.errors import invalid_request
from selma_ray.serving.guards import App, Message, Receive, Scope, Send, error_response

__all__ = ["RepeatAnswers"]

_LIFETIME_S = 600.0
_MAX_BYTES = 128_000_000
_MAX_ENTRIES = 1000
_MAX_KEY_CHARS = 255


@dataclass
class _Answer:
    """An answer, whole once `ended` is set; where `kept` is false then, whoever waits asks for itself."""

    body_digest: bytes
    began_s: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[Message] = field(default_factory=list)
    kept: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.messages)


class RepeatAnswers:
    """Keeps answers by the caller's key, the path and the Idempotency-Key, for ten minutes; stands after the body was read.

    Refusals that another try may turn (429, 500 and above) and streams are not kept. The same key with another body is refused.
    """

    def __init__(self, app: App, now_s: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._now_s = now_s
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or repeat the answer to an earlier one."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers({})
        key = headers.get("idempotency-key")
        if key is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if not 0 < len(key) <= _MAX_KEY_CHARS:
            refusal = invalid_request(f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} characters, got {len(key)}")
            await error_response(refusal)(scope, receive, send)
            return
        message = await receive()
        name = _digest(headers.get("authorization", "").encode(), scope["path"].encode(), key.encode(errors="replace"))
        body_digest = _body_digest(message.get("body", b""), headers.get("content-type", ""))

        async def replay() -> Message:
            nonlocal message
            given, message = message, {"type": "http.disconnect"}
            return given if given["type"] == "http.request" else await receive()

        while (known := self._known(name)) is not None:
            if known.body_digest != body_digest:
                refusal = invalid_request(
                    "Idempotency-Key was used with another body; take a new key",
                    code="idempotency_key_reused",
                    status=409,
                )
                await error_response(refusal)(scope, receive, send)
                return
            await known.ended.wait()
            if known.kept:
                for each in known.messages:
                    await send(each)
                return
        await self._answer(name, _Answer(body_digest, self._now_s()), scope, replay, send)

    async def _answer(self, name: bytes, answer: _Answer, scope: Scope, receive: Receive, send: Send) -> None:
        self._answers[name] = answer
        streamed = False

        async def send_noted(message: Message) -> None:
            nonlocal streamed
            if message["type"] == "http.response.start":
                streamed = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
            if not streamed:
                answer.messages.append(dict(message))
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
            status = answer.messages[0]["status"] if answer.messages else 500
            answer.kept = status < 500 and status not in (408, 429)
        finally:
            if not answer.kept and self._answers.get(name) is answer:
                del self._answers[name]
            answer.ended.set()
            self._make_room()

    def _known(self, name: bytes) -> _Answer | None:
        while self._answers:
            oldest = next(iter(self._answers.values()))
            if not oldest.ended.is_set() or oldest.began_s + _LIFETIME_S > self._now_s():
                break
            self._answers.popitem(last=False)
        return self._answers.get(name)

    def _make_room(self) -> None:
        """Forget the oldest answers while there are too many; those that are not whole yet stay, as somebody may wait for them."""
        ended = [name for name, answer in self._answers.items() if answer.ended.is_set()]
        num_bytes = sum(self._answers[name].num_bytes for name in ended)
        while ended and (len(ended) > _MAX_ENTRIES or num_bytes > _MAX_BYTES):
            num_bytes -= self._answers.pop(ended.pop(0)).num_bytes


def _body_digest(body: bytes, content_type: str) -> bytes:
    """Return a digest that is the same for a form that is sent again, between whose parts clients put another boundary every time."""
    kind, parameters = parse_options_header(content_type)
    if kind == b"multipart/form-data" and parameters.get(b"boundary"):
        body = body.replace(parameters[b"boundary"], b"")
    return hashlib.sha256(body).digest()


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
