"""The end of a service: requests that were accepted finish within a bound, new ones are refused at once."""

import asyncio

from selma_ray.serving.errors import shutting_down
from selma_ray.serving.guards import App, Message, Receive, Scope, Send, error_response

__all__ = ["Gate", "KeepGate"]

_CUT_OFF_S = 1.0  # for what was cut off to answer so


class Gate:
    """Lets requests in until it is closed, and knows those that have not ended; belongs to one event loop."""

    def __init__(self) -> None:
        self.is_closed = False
        self._running: set[asyncio.Task[None]] = set()
        self._cut_off: set[asyncio.Task[None]] = set()

    def enter(self, task: "asyncio.Task[None]") -> None:
        """Note a request until it ends."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def has_cut_off(self, task: "asyncio.Task[None]") -> bool:
        """Tell whether a request was ended by the gate."""
        return task in self._cut_off

    async def close(self, timeout_s: float) -> int:
        """Refuse new requests, wait for those that run, cut off what is left after `timeout_s`; returns how many those were."""
        self.is_closed = True
        if not self._running:
            return 0
        _, late = await asyncio.wait(self._running, timeout=timeout_s)
        self._cut_off |= late
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CUT_OFF_S)
        return len(late)


class KeepGate:
    """Answers 503 once the gate is closed, and whatever the gate cuts off; `open_paths` are answered to the end."""

    def __init__(self, app: App, gate: Gate, open_paths: tuple[str, ...] = ()) -> None:
        self._app = app
        self._gate = gate
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        if self._gate.is_closed:
            await error_response(shutting_down())(scope, receive, send)
            return
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async def answer() -> None:
            await self._app(scope, receive, send_noted)

        task = asyncio.create_task(answer())
        self._gate.enter(task)
        try:
            await task
        except asyncio.CancelledError:
            # A stream that has begun breaks off, so that nobody takes it for whole.
            if begun or not self._gate.has_cut_off(task):
                raise
            await error_response(shutting_down())(scope, receive, send)
