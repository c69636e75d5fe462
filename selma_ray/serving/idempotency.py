"""Requests that are sent again with the same Idempotency-Key get the first one's answer, and nothing is drawn twice."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from selma_ray.serving.errors import invalid_request
from selma_ray.serving.guards import App, Message, Receive, Scope, Send, error_response

__all__ = ["AnswerStore", "Answers", "Claim", "RepeatAnswers"]

_LIFETIME_S = 600.0
_MAX_BYTES = 128_000_000
_MAX_ENTRIES = 1000
_MAX_KEY_CHARS = 255


@dataclass(frozen=True)
class Claim:
    """What is to be answered to a request: it is the claimant's own to answer, an answer to repeat, or a refusal of another body."""

    kind: Literal["own", "repeat", "other body"]
    messages: Sequence[Message] = ()


@dataclass
class _Answer:
    """An answer, whole once `ended` is set; where `kept` is false then, whoever waits answers for itself."""

    body_digest: bytes
    began_s: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    messages: Sequence[Message] = ()
    kept: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.messages)


class Answers:
    """Answers by name, for ten minutes, and the claims of those who are answering; belongs to one event loop.

    A claim ends after `claims_end_after_s` where its owner may die unnoticed.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic, claims_end_after_s: float | None = None) -> None:
        self._now_s = now_s
        self._claims_end_after_s = claims_end_after_s
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()

    async def claim(self, name: bytes, body_digest: bytes) -> Claim:
        """Tell what is to be answered, once nobody else is answering; who owns a claim must keep an answer or release it."""
        while (known := self._known(name)) is not None:
            if known.body_digest != body_digest:
                return Claim("other body")
            if not await self._has_ended(known):
                self._end(name, known)
            elif known.kept:
                return Claim("repeat", known.messages)
        self._answers[name] = _Answer(body_digest, self._now_s())
        return Claim("own")

    def keep(self, name: bytes, messages: Sequence[Message]) -> None:
        """Keep the answer to what was claimed."""
        if (answer := self._answers.get(name)) is not None and not answer.ended.is_set():
            answer.messages, answer.kept = messages, True
            answer.ended.set()
            self._make_room()

    def release(self, name: bytes) -> None:
        """Give back a claim; whoever waits for its answer answers for itself."""
        if (answer := self._answers.get(name)) is not None and not answer.ended.is_set():
            self._end(name, answer)

    async def _has_ended(self, answer: _Answer) -> bool:
        """Wait for an answer; tells whether it came before the claim's end."""
        if self._claims_end_after_s is None:
            return await answer.ended.wait()
        try:
            left_s = answer.began_s + self._claims_end_after_s - self._now_s()
            return await asyncio.wait_for(answer.ended.wait(), max(0.0, left_s))
        except TimeoutError:
            return False

    def _end(self, name: bytes, answer: _Answer) -> None:
        if self._answers.get(name) is answer:
            del self._answers[name]
        answer.ended.set()

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


class AnswerStore(Protocol):
    """Where answers are kept: see Answers."""

    async def claim(self, name: bytes, body_digest: bytes) -> Claim:
        """Tell what is to be answered, once nobody else is answering."""
        ...

    async def keep_answer(self, name: bytes, messages: Sequence[Message]) -> None:
        """Keep the answer to what was claimed."""
        ...

    async def release(self, name: bytes) -> None:
        """Give back a claim."""
        ...


class RepeatAnswers:
    """Keeps answers by the caller's key, the path and the Idempotency-Key; stands after the body was read.

    Refusals that another try may turn (429, 500 and above) and streams are not kept. The same key with another body is refused.
    """

    def __init__(self, app: App, store: AnswerStore) -> None:
        self._app = app
        self._store = store
        self._telling: set[asyncio.Future[None]] = set()

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

        async def replay() -> Message:
            nonlocal message
            given, message = message, {"type": "http.disconnect"}
            return given if given["type"] == "http.request" else await receive()

        claim = await self._store.claim(name, _body_digest(message.get("body", b""), headers.get("content-type", "")))
        if claim.kind == "own":
            await self._answer(name, scope, replay, send)
        elif claim.kind == "repeat":
            for each in claim.messages:
                await send(each)
        else:
            refusal = invalid_request(
                "Idempotency-Key was used with another body; take a new key", code="idempotency_key_reused", status=409
            )
            await error_response(refusal)(scope, receive, send)

    async def _answer(self, name: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []
        streamed = kept = False

        async def send_noted(message: Message) -> None:
            nonlocal streamed
            if message["type"] == "http.response.start":
                streamed = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
            if not streamed:
                messages.append(dict(message))
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
            status = messages[0]["status"] if messages else 500
            kept = status < 500 and status not in (408, 429)
        finally:
            # Told without being waited for: who is cancelled here could not wait.
            telling = self._store.keep_answer(name, messages) if kept else self._store.release(name)
            self._tell(asyncio.ensure_future(telling))

    def _tell(self, task: "asyncio.Future[None]") -> None:
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


def _body_digest(body: bytes, content_type: str) -> bytes:
    """Return a digest that is the same for a form that is sent again, between whose parts clients put another boundary every time."""
    kind, parameters = parse_options_header(content_type)
    if kind == b"multipart/form-data" and parameters.get(b"boundary"):
        body = body.replace(parameters[b"boundary"], b"")
    return hashlib.sha256(body).digest()


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
