"""Rows of several callers in shared batches."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.images.batching import SharedBatches


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_every_caller_gets_the_results_of_its_own_rows(batch_size: int, counts: list[int]) -> None:
    batches: list[int] = []

    def double(rows: Sequence[int]) -> list[int]:
        batches.append(len(rows))
        return [2 * row for row in rows]

    shared = SharedBatches(double, batch_size)
    tasks = [range(100 * number, 100 * number + count) for number, count in enumerate(counts)]
    with ThreadPoolExecutor(len(tasks)) as callers:
        results = list(callers.map(shared.render, tasks))
    assert [[each for each, _ in result] for result in results] == [[2 * row for row in task] for task in tasks]
    assert sum(batches) == sum(counts)
    assert max(batches, default=0) <= batch_size


def test_rows_of_two_callers_fill_a_batch() -> None:
    batches: list[list[str]] = []
    go_on = threading.Event()

    def render(rows: Sequence[str]) -> Sequence[str]:
        batches.append(list(rows))
        assert go_on.wait(60)
        return rows

    shared = SharedBatches(render, 4)
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(shared.render, ["a1", "a2", "a3", "a4", "a5"])
        while not batches:
            time.sleep(0.01)
        second = callers.submit(shared.render, ["b1", "b2", "b3"])
        while len(shared._waiting) < 4:
            time.sleep(0.01)
        go_on.set()
        assert len(first.result()) == 5
        assert len(second.result()) == 3
    assert batches == [["a1", "a2", "a3", "a4"], ["a5", "b1", "b2", "b3"]]


def test_an_error_reaches_the_callers_of_its_batch_and_nobody_else() -> None:
    def render(rows: Sequence[int]) -> Sequence[float]:
        return [1 / row for row in rows]

    shared = SharedBatches(render, 2)
    with pytest.raises(ZeroDivisionError):
        shared.render([1, 0])
    assert [each for each, _ in shared.render([1, 2, 4])] == [1, 0.5, 0.25]


def test_a_function_runs_alone_between_batches() -> None:
    shared: SharedBatches[Any, int] = SharedBatches(lambda rows: [threading.get_ident() for _ in rows], 2)
    ((of_batch, _),) = shared.render([1])
    assert shared.alone(lambda add: threading.get_ident() + add, 0) == of_batch


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=5))
def test_a_batch_is_of_one_kind_and_no_row_is_forgotten(batch_size: int, tasks: list[list[int]]) -> None:
    batches: list[list[int]] = []

    def render(rows: Sequence[int]) -> Sequence[int]:
        batches.append(list(rows))
        return rows

    shared = SharedBatches(render, batch_size, kind=lambda row: row)
    with ThreadPoolExecutor(len(tasks)) as callers:
        results = list(callers.map(shared.render, tasks))
    assert [[each for each, _ in result] for result in results] == tasks
    assert all(len(set(batch)) == 1 and len(batch) <= batch_size for batch in batches)


def test_a_full_batch_goes_before_the_first_row() -> None:
    batches: list[list[str]] = []

    def render(rows: Sequence[str]) -> Sequence[str]:
        batches.append(list(rows))
        return rows

    SharedBatches(render, 2, kind=lambda row: row[0]).render(["a1", "b1", "b2", "c1", "b3"])
    assert batches == [["b1", "b2"], ["a1"], ["c1"], ["b3"]]
