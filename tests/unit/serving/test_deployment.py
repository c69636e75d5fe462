"""What the API makes of how a replica answers."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from selma_ray.serving.deployment import Deployments
from selma_ray.serving.errors import RequestError, invalid_request


class Response:
    """Stands for a replica's answer: awaited, it does as it is told; `cancelled` tells whether it was called off."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer
        self.cancelled = False

    def __await__(self):
        return self._answer().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands for a deployment's handle, every method of which gives the same response."""

    def __init__(self, response: Response) -> None:
        self._response = response

    def __getattr__(self, name: str) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> Response:
        return self._response


def raising(error: BaseException) -> Response:
    async def answer() -> None:
        raise error

    return Response(answer)


async def generate(response: Response, timeout_s: float = 60) -> Any:
    return await Deployments(Handle(response), None, timeout_s).generate([], "png")


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

    async def leave() -> None:
        task = asyncio.create_task(generate(response))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
    assert response.cancelled


def test_scores_without_an_evaluator_are_404() -> None:
    with pytest.raises(RequestError) as refusal:
        asyncio.run(Deployments(Handle(raising(ZeroDivisionError())), None, 60).score("a ball", b""))
    assert refusal.value.status == 404
