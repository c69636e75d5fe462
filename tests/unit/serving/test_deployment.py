"""What the API makes of how a replica answers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from selma_ray.cluster.config import ClusterConfig
from selma_ray.config import validate
from selma_ray.errors import ConfigError, ServingError
from selma_ray.models.config import ModelConfig
from selma_ray.serving.backend import Images
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.deployment import application
from selma_ray.serving.encoding import PNG
from selma_ray.serving.errors import RequestError, invalid_request, queue_full
from selma_ray.serving.generator import Generator
from selma_ray.serving.handles import Deployments
from selma_ray.serving.metrics import MeasureRequests, Metrics
from selma_ray.serving.replicas import GeneratorReplica
from selma_ray.serving.served import ServedModels

IMAGES = Images([b"image"], 3, 77)


class Response:
    """Stands for a replica's answer: awaited, it does as it is told; `cancelled` tells whether it was called off."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer().__await__()

    def __aiter__(self) -> Any:
        return self._answer()

    async def results_async(self, **options: Any) -> Any:
        return await self._answer()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands for a deployment's handle, every method of which gives the next response, the last of them for ever."""

    def __init__(self, *responses: Response) -> None:
        self._responses = list(responses)
        self.asked = 0

    def __getattr__(self, name: str) -> "Handle":
        return self

    def options(self, **options: Any) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> Response:
        self.asked += 1
        return self._responses.pop(0) if len(self._responses) > 1 else self._responses[0]

    broadcast = remote


def raising(error: BaseException) -> Response:
    async def answer() -> None:
        raise error

    return Response(answer)


async def generate(response: Response, timeout_s: float = 60) -> Any:
    return await Deployments({"": Handle(response)}, None, timeout_s).generate([], PNG)


def replica_error(cause: Exception) -> Exception:
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (replica_error(invalid_request("no", "prompt", status=422)), 422),
        (BackPressureError(1, 1), 429),
        (ActorDiedError(), 503),
        (RequestCancelledError("1"), 503),
    ],
)
def test_errors_of_replicas_become_refusals(error: Exception, status: int) -> None:
    with pytest.raises(RequestError) as refusal:
        asyncio.run(generate(raising(error)))
    assert refusal.value.status == status
    assert type(refusal.value) is RequestError


def test_what_a_replica_had_accepted_before_it_died_waits_for_room_at_another() -> None:
    answer = Response(lambda: asyncio.sleep(0, IMAGES))
    handle = Handle(
        raising(ActorDiedError()), raising(BackPressureError(1, 1)), raising(BackPressureError(1, 1)), answer
    )
    assert asyncio.run(Deployments({"": handle}, None, 60).generate([], PNG)) == IMAGES
    assert handle.asked == 4
    full = Handle(raising(ActorDiedError()), raising(BackPressureError(1, 1)))
    with pytest.raises(RequestError, match="longer than") as refusal:
        asyncio.run(Deployments({"": full}, None, 0.3).generate([], PNG))
    assert refusal.value.status == 504


def test_a_full_service_says_when_to_come_back_by_how_long_answers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 1000, 7))
    monkeypatch.setattr("selma_ray.serving.handles.time", SimpleNamespace(monotonic=lambda: next(now_s)))
    handle = Handle(Response(lambda: asyncio.sleep(0, IMAGES)), raising(BackPressureError(1, 1)))

    async def ask() -> RequestError:
        backend = Deployments({"": handle}, None, 60)
        with pytest.raises(RequestError) as first:
            await Deployments({"": Handle(raising(BackPressureError(1, 1)))}, None, 60).generate([], PNG)
        assert first.value.retry_after_s == 2
        await backend.generate([], PNG)
        with pytest.raises(RequestError) as refusal:
            await backend.generate([], PNG)
        return refusal.value

    refusal = asyncio.run(ask())
    assert (refusal.status, refusal.retry_after_s) == (429, 14)


def test_an_error_of_ours_is_not_taken_for_a_replica_that_is_down() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(generate(raising(replica_error(ZeroDivisionError()))))


def test_time_is_limited_and_the_replica_is_told_to_stop() -> None:
    response = Response(lambda: asyncio.sleep(3600))
    with pytest.raises(RequestError, match=r"longer than 0\.01 s") as refusal:
        asyncio.run(generate(response, timeout_s=0.01))
    assert refusal.value.status == 504
    assert response.cancelled


def test_when_the_client_goes_away_the_replica_is_told_to_stop() -> None:
    response = Response(lambda: asyncio.sleep(3600))

    metrics = Metrics()

    async def ask(scope: Any, receive: Any, send: Any) -> None:
        await generate(response)

    async def leave() -> None:
        scope = {"type": "http", "method": "POST"}
        task = asyncio.create_task(MeasureRequests(ask, metrics)(scope, None, None))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
    assert response.cancelled
    assert 'status="499"} 1.0' in metrics.exposition().decode()


def test_what_dies_with_a_replica_is_asked_of_another() -> None:
    async def images() -> Images:
        return IMAGES

    handle = Handle(raising(ActorDiedError()), Response(images))
    assert asyncio.run(Deployments({"": handle}, None, 60).generate([], PNG)) == IMAGES
    handle = Handle(raising(ActorDiedError()))
    with pytest.raises(RequestError) as refusal:
        asyncio.run(Deployments({"": handle}, None, 60).generate([], PNG))
    assert (refusal.value.status, handle.asked) == (503, 3)


def streamed(response: Response, timeout_s: float = 60, up_to: int = 9) -> list[Any]:
    async def collect() -> list[Any]:
        stream = Deployments({"": Handle(response)}, None, timeout_s).stream([], PNG)
        drawn = []
        async for each in stream:
            drawn.append(each)
            if len(drawn) == up_to:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return drawn

    return asyncio.run(collect())


def test_a_stream_is_passed_on_and_called_off_when_its_reader_stops() -> None:
    async def answer() -> AsyncIterator[Any]:
        for each in range(3):
            yield each

    assert streamed(Response(answer)) == [0, 1, 2]
    response = Response(answer)
    assert streamed(response, up_to=1) == [0]
    assert response.cancelled


@pytest.mark.parametrize(
    ("error", "status"), [(replica_error(queue_full(2)), 429), (ActorDiedError(), 503), (BackPressureError(1, 1), 429)]
)
def test_a_stream_ends_in_the_refusal_that_its_replica_gave(error: Exception, status: int) -> None:
    async def answer() -> AsyncIterator[Any]:
        raise error
        yield

    with pytest.raises(RequestError) as refusal:
        streamed(Response(answer))
    assert (refusal.value.status, type(refusal.value)) == (status, RequestError)


def test_a_streams_time_is_limited() -> None:
    async def answer() -> AsyncIterator[Any]:
        yield 0
        await asyncio.sleep(3600)
        yield 1

    response = Response(answer)
    with pytest.raises(RequestError) as refusal:
        streamed(response, timeout_s=0.05)
    assert refusal.value.status == 504
    assert response.cancelled


@pytest.mark.parametrize("answers", [[], [RuntimeError("dead")]])
def test_without_a_replica_that_answers_the_service_is_not_ready(answers: list) -> None:
    async def answer() -> list:
        return answers

    with pytest.raises(RequestError) as refusal:
        asyncio.run(Deployments({"": Handle(Response(answer))}, None, 60).check_ready())
    assert refusal.value.status == 503


def test_a_generator_whose_engine_is_stuck_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    replica = object.__new__(GeneratorReplica)
    replica._generator = object.__new__(Generator)
    monkeypatch.setattr(Generator, "check_health", lambda self: None)
    replica.check_health()
    assert not ended

    def stuck(self: Generator) -> None:
        raise ServingError("the engine has not taken a step for 120 s")

    monkeypatch.setattr(Generator, "check_health", stuck)
    replica.check_health()
    assert ended == [1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"evaluator_replicas": 0},
        {"max_generator_replicas": 3, "max_evaluator_replicas": 2},
        {"api_replicas": 2},
    ],
)
def test_ray_serve_accepts_the_deployments(options: dict[str, Any]) -> None:
    app = application(
        ServedModels("merged", ModelConfig()),
        ServingConfig(**options),
        ClusterConfig(use_labels=True),
        Handle,  # type: ignore[arg-type]
    )
    assert isinstance(app, serve.Application)


def test_more_replicas_than_the_most_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_generator_replicas must be at least generator_replicas, which is 4"):
        validate(ServingConfig, {"generator_replicas": 4, "max_generator_replicas": 3}, "recipe")


def test_scores_without_an_evaluator_are_404() -> None:
    with pytest.raises(RequestError) as refusal:
        asyncio.run(Deployments({"": Handle(raising(ZeroDivisionError()))}, None, 60).score("a ball", [b""], ["dsg"]))
    assert refusal.value.status == 404
