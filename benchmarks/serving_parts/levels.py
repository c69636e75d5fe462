"""What becomes of requests for small and large images at several rates of arrivals, as a table and ratios."""

from collections import Counter
from typing import Any

from benchmarks.common import print_table
from benchmarks.serving_parts.load import beside, closed_loop, latency_alone, open_loop, summary

__all__ = ["LEVELS", "first_over_steady", "under_load"]

Body = dict[str, Any]

SMALL, LARGE = "64x64", "96x96"  # the default, and the largest that is allowed
SMALL_TO_A_LARGE = 4  # requests of which one is for a large image
LEVELS = (0.5, 0.8, 0.95, 1.1)
"""Rates of arrivals, as shares of the capacity."""
_CLIENTS = 16
_CALLS = 15


def first_over_steady(url: str, body: Body) -> float:
    """Return the latency of the service's first request over that of later ones."""
    return latency_alone(url, body, 1) / latency_alone(url, body, _CALLS)


def under_load(url: str, body: Body, load_s: int, large_at_once: int) -> dict[str, float]:
    """Print what becomes of small and large images at several rates; returns the ratios of it."""
    bodies = {size: {**body, "size": size} for size in (SMALL, LARGE)}
    alone_s = {size: latency_alone(url, each, _CALLS) for size, each in bodies.items()}
    beside_s = beside(url, bodies[SMALL], bodies[LARGE], large_at_once, _CALLS)

    def mixed(number: int) -> tuple[str, Body]:
        size = SMALL if number % SMALL_TO_A_LARGE else LARGE
        return size, {**bodies[size], "seed": number}

    planned = [mixed(number)[1] for number in range(6 * _CLIENTS)]
    capacity = len(planned) / closed_loop(url, planned, _CLIENTS)
    levels = {}
    for seed, share in enumerate(LEVELS):
        answers = open_loop(url, mixed, share * capacity, load_s, seed)
        levels[share] = summary(answers, share, capacity, alone_s, SMALL, LARGE)
        statuses = dict(Counter(answer.status for answer in answers))
        print(f"at {share:.0%} of {capacity:.2f} requests/s: {statuses}", flush=True)
    header = (
        "offered", "p50 s", "p95 s", "p99 s", "goodput of capacity", "refused", "small slowed over large slowed",
    )  # fmt: skip
    print_table(
        header,
        [
            (
                f"{level.offered:.0%}", f"{level.p50_s:.2f}", f"{level.p95_s:.2f}", f"{level.p99_s:.2f}",
                f"{level.goodput:.2f}", f"{level.refused:.0%}", f"{level.unfairness:.2f}",
            )
            for level in levels.values()
        ],
    )  # fmt: skip
    return {
        "small_beside_large": beside_s / alone_s[SMALL],
        "p99_at_80": levels[0.8].p99_s,
        "goodput_at_110": levels[1.1].goodput,
    }
