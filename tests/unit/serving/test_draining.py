"""A service that ends: what was accepted finishes within a bound, what comes later is refused at once."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.exceptions import RayServeException

from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.draining import Gate
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.run import Service
from selma_ray.serving.served import ModelNames
from tests.unit.serving.recorder import Recorder

BODY = {"prompt": "a cat"}
PATH = "/v1/images/generations"


class Held(Recorder):
    """Draws when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.free = asyncio.Event()
        self.left = 0

    async def generate(self, requests: Sequence[ImageRequest], file_format: Any) -> Any:
        self.begun.set()
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return await super().generate(requests, file_format)


def client_for(backend: Recorder, gate: Gate) -> httpx.AsyncClient:
    app = build_app(backend, ServingConfig(), ModelNames("merged"), (), gate)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000")


def test_what_was_accepted_finishes_and_new_requests_are_refused_at_once() -> None:
    async def scenario() -> None:
        backend, gate = Held(), Gate()
        async with client_for(backend, gate) as client:
            accepted = asyncio.create_task(client.post(PATH, json=BODY))
            await backend.begun.wait()
            closing = asyncio.create_task(gate.close(60))
            await asyncio.sleep(0)
            refused = await client.post(PATH, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["Retry-After"]) > 0
            assert refused.headers["x-request-id"].startswith("req_")
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            assert "503" in (await client.get("/metrics")).text
            assert not closing.done()
            backend.free.set()
            assert (await accepted).status_code == 200
            assert await closing == 0

    asyncio.run(scenario())


def test_what_does_not_finish_in_time_is_cut_off_and_answered() -> None:
    async def scenario() -> None:
        backend, gate = Held(), Gate()
        async with client_for(backend, gate) as client:
            accepted = asyncio.create_task(client.post(PATH, json=BODY))
            await backend.begun.wait()
            assert await gate.close(0.05) == 1
            answer = await accepted
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            assert backend.left == 1, "its slot is free"

    asyncio.run(scenario())


def test_an_idle_service_ends_at_once() -> None:
    assert asyncio.run(asyncio.wait_for(Gate().close(60), 1)) == 0


def test_a_client_that_leaves_takes_its_request_along() -> None:
    async def scenario() -> None:
        backend, gate = Held(), Gate()
        async with client_for(backend, gate) as client:
            accepted = asyncio.create_task(client.post(PATH, json=BODY))
            await backend.begun.wait()
            accepted.cancel()
            with pytest.raises(asyncio.CancelledError):
                await accepted
            assert 'status="499"} 1.0' in (await client.get("/metrics")).text
            assert backend.left == 1
            assert await gate.close(60) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_waiting_and_the_next_one_is_not_held_back(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)  # pytest-xdist's workers ignore SIGINT
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        Service("http://127.0.0.1:8000", ServingConfig()).wait()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept: list[Any] = []

    def interrupt_and_terminate() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        kept.append(signal.getsignal(signal.SIGINT))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        threading.Timer(0.1, interrupt_and_terminate).start()
        Service("http://127.0.0.1:8000", ServingConfig()).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept == [signal.SIG_IGN]


def test_a_service_that_is_dead_has_nothing_to_drain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(deployment: str, application: str) -> Any:
        raise RayServeException("no application\nnamed selma")

    monkeypatch.setattr(serve, "get_deployment_handle", gone)
    Service("http://127.0.0.1:8000", ServingConfig()).drain()
    assert caplog.messages == ["the service ends without its requests in progress: no application"]


class RefusesLoops:
    """A deployment's handle, which waits for answers as Ray Serve's does: not in an asyncio loop."""

    def broadcast(self, method: str, *arguments: Any) -> "RefusesLoops":
        self.asked = method
        return self

    def results(self, timeout_s: float) -> list[int]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return [2]


@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_a_service_can_be_ended_from_a_notebook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_a_notebook: bool
) -> None:
    async def drain_in_a_loop() -> None:
        service.drain()

    handle, service = RefusesLoops(), Service("http://127.0.0.1:8000", ServingConfig(drain_s=5))
    monkeypatch.setattr(serve, "get_deployment_handle", lambda deployment, application: handle)
    asyncio.run(drain_in_a_loop()) if in_a_notebook else service.drain()
    assert handle.asked == "drain"
    assert caplog.messages == ["2 requests were cut off after serving.drain_s 5; set it higher"]


def test_ending_is_not_waited_for_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(serve, "delete", lambda name: ended.wait(30))
    Service("http://127.0.0.1:8000", ServingConfig(), alone=False).leave(within_s=0.05)
    ended.set()


def test_ray_serve_is_not_told_to_end_where_it_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its controller never answers that it ends: it kills itself, and the raylet tells of a crash."""
    monkeypatch.setattr(serve, "shutdown", lambda: pytest.fail("Ray Serve was told to end"))
    Service("http://127.0.0.1:8000", ServingConfig()).leave(within_s=0.05)
