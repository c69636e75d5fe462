"""Open-loop load: requests arrive at random moments at a given rate, whether or not earlier ones have been answered.

A closed loop of clients slows down with the service and hides what its users would wait. Latency is counted from the moment at which
a request was due, so that a load generator that falls behind does not hide it either.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

__all__ = [
    "Answer",
    "Level",
    "LoadReport",
    "beside",
    "closed_loop",
    "latency_alone",
    "open_loop",
    "percentile",
    "summary",
]

Body = dict[str, Any]

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Answer:
    """How a request was answered."""

    kind: str
    """What its body asks for, such as a size."""
    status: int
    seconds: float
    """From the moment at which it was due."""
    ended_s: float
    """Since the load began."""


@dataclass(frozen=True)
class Level:
    """What came of one rate of arrivals."""

    offered: float
    """Share of the capacity."""
    p50_s: float
    p95_s: float
    p99_s: float
    goodput: float
    """Requests answered with images a second, as a share of the capacity."""
    refused: float
    """Share of the requests that were refused."""
    unfairness: float
    """How much longer one kind took than alone, over how much longer the other did: 1 is fair, more is to the small one's cost."""


LoadReport = Sequence[Level]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent of the values do not exceed; not a number where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def summary(
    answers: Sequence[Answer], offered: float, capacity: float, alone_s: Mapping[str, float], small: str, large: str
) -> Level:
    """Return what came of a level of load; `alone_s` is the latency of each kind without any load."""
    drawn = [answer for answer in answers if answer.status == 200]
    seconds = [answer.seconds for answer in drawn]
    slower = {
        kind: percentile([answer.seconds for answer in drawn if answer.kind == kind], 50) / alone_s[kind]
        for kind in (small, large)
    }
    duration_s = max((answer.ended_s for answer in answers), default=math.nan)
    return Level(
        offered,
        percentile(seconds, 50),
        percentile(seconds, 95),
        percentile(seconds, 99),
        len(drawn) / duration_s / capacity,
        1 - len(drawn) / len(answers) if answers else math.nan,
        slower[small] / slower[large],
    )


def open_loop(
    url: str, bodies: Callable[[int], tuple[str, Body]], rate: float, seconds: float, seed: int
) -> list[Answer]:
    """Send requests for so many seconds at `rate` a second, as a Poisson process; returns all answers.

    `bodies` gives the kind and the body of each request by its number.
    """
    rng = random.Random(seed)
    due_s = list(itertools.takewhile(lambda due: due < seconds, itertools.accumulate(_gaps(rng, rate))))
    return asyncio.run(_send(url, [(due, *bodies(number)) for number, due in enumerate(due_s)]))


def _gaps(rng: random.Random, rate: float) -> Any:
    while True:
        yield rng.expovariate(rate)


async def _send(url: str, planned: Sequence[tuple[float, str, Body]]) -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, limits=limits) as client:
        began_s = time.monotonic()

        async def send(due_s: float, kind: str, body: Body) -> Answer:
            await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
            response = await client.post(url, json=body)
            ended_s = time.monotonic() - began_s
            return Answer(kind, response.status_code, ended_s - due_s, ended_s)

        return list(await asyncio.gather(*(send(*each) for each in planned)))


def closed_loop(url: str, bodies: Sequence[Body], clients: int) -> float:
    """Return the seconds in which so many clients, each one request at a time, get all bodies answered."""

    async def run() -> float:
        waiting = iter(bodies)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:

            async def ask() -> None:
                for body in waiting:
                    (await client.post(url, json=body)).raise_for_status()

            began_s = time.monotonic()
            await asyncio.gather(*(ask() for _ in range(clients)))
            return time.monotonic() - began_s

    return asyncio.run(run())


def latency_alone(url: str, body: Body, calls: int) -> float:
    """Return the median seconds of a request with nothing else going on."""
    seconds = []
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
        for _ in range(calls):
            began_s = time.monotonic()
            client.post(url, json=body).raise_for_status()
            seconds.append(time.monotonic() - began_s)
    return percentile(seconds, 50)


def beside(url: str, body: Body, other: Body, others: int, calls: int) -> float:
    """Return the median seconds of a request while so many clients keep asking for `other`."""

    async def run() -> list[float]:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:

            async def keep_asking() -> None:
                while True:
                    (await client.post(url, json=other)).raise_for_status()

            asking = [asyncio.create_task(keep_asking()) for _ in range(others)]
            seconds = []
            try:
                for _ in range(calls):
                    began_s = time.monotonic()
                    (await client.post(url, json=body)).raise_for_status()
                    seconds.append(time.monotonic() - began_s)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            return seconds

    return percentile(asyncio.run(run()), 50)
