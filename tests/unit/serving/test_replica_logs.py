"""What a replica logs, beside Ray Serve's own logger as a replica has it."""

import io
import logging
from collections.abc import Iterator

import pytest

from selma_ray.serving.errors import queue_full
from selma_ray.serving.replica_logs import join_serve_logs


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Yield what a replica's log file gets; both loggers are as they were afterwards."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", "selma_ray")]
    before = [(each.handlers, each.level, each.propagate, each.filters) for each in loggers]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    for each in loggers:
        each.handlers, each.filters = [handler] if each.name == "ray.serve" else [], []
    yield stream
    for each, (each.handlers, each.level, each.propagate, each.filters) in zip(loggers, before, strict=True):
        each.setLevel(each.level)


def fail_with(error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger("ray.serve").exception("Request failed.")


@pytest.mark.parametrize(("level", "lines"), [("INFO", 2), ("WARNING", 1), ("ERROR", 0)])
def test_the_packages_records_have_the_replicas_level(log: io.StringIO, level: str, lines: int) -> None:
    logging.getLogger("ray.serve").setLevel(level)
    join_serve_logs()
    logger = logging.getLogger("selma_ray.serving.generator")
    logger.info("loaded")
    logger.warning("slow")
    assert len(log.getvalue().splitlines()) == lines


def test_a_refusal_is_one_line_and_no_failure(log: io.StringIO) -> None:
    logging.getLogger("ray.serve").setLevel("INFO")
    join_serve_logs()
    join_serve_logs()
    fail_with(queue_full(2))
    assert log.getvalue() == "INFO ray.serve refused (429 queue_full): the queue is full; try again later\n"
    logging.getLogger("ray.serve").setLevel("WARNING")
    fail_with(queue_full(2))
    assert len(log.getvalue().splitlines()) == 1


def test_a_fault_keeps_its_stack(log: io.StringIO) -> None:
    logging.getLogger("ray.serve").setLevel("WARNING")
    join_serve_logs()
    fail_with(ZeroDivisionError("ours"))
    assert "ERROR ray.serve Request failed." in log.getvalue()
    assert "Traceback" in log.getvalue()
