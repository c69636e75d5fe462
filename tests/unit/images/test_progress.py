import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import RenderError
from selma_ray.images.config import ImagesConfig
from selma_ray.images.in_flight import begin_batch
from selma_ray.images.progress import follow, read_progress
from selma_ray.images.shards import write_shards
from selma_ray.storage import RunFolder
from tests.unit.images.test_shards import row, table


class Stream:
    """Rows as a Ray dataset hands them out."""

    def __init__(self, *errors: str | None, again: bool = False) -> None:
        self._errors = errors
        self._again = again
        self.taken = 0

    def iter_rows(self) -> Iterator[Any]:
        for error in self._errors:
            self.taken += 1
            yield {"id": "x", "split": "train", "error": error, "again": self._again, "seconds": 0.5, "score": None}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def test_progress_is_handed_on_and_written(folder: RunFolder) -> None:
    write_shards(folder, table(row("a")))
    steps = [progress for _, progress in follow(Stream(None, None, None), folder, ImagesConfig(), total=8)]
    assert [step.done for step in steps] == [2, 3, 4]
    written = read_progress(folder)
    assert (written.found, written.rendered, written.total, written.ended) == (1, 3, 8, True)
    assert written.images_per_s > 0
    assert written.seconds_left == pytest.approx(4 / written.images_per_s)
    assert abs(written.updated_at - time.time()) < 60


def test_figures_are_words(folder: RunFolder) -> None:
    steps = [
        progress
        for _, progress in follow(
            Stream(None, "ValueError: no", None), folder, ImagesConfig(max_failed_fraction=1), total=8
        )
    ]
    assert steps[0].words == "images: starting, 0 failed"
    assert re.fullmatch(r"images: \S+/s, \d+\.\d min left, 1 failed \(1 ValueError: no\)", steps[-1].words)
    chosen = replace(steps[0], rejected=3)
    assert chosen.words == "images: starting, 3 not chosen, 0 failed"


def test_a_new_start_counts_what_the_last_one_lost(folder: RunFolder) -> None:
    list(follow(Stream(None, again=True), folder, ImagesConfig(), total=8))
    begin_batch(folder, ["b", "c"])
    list(follow(Stream(None), folder, ImagesConfig(), total=8))
    written = read_progress(folder)
    assert (written.starts, written.again) == (2, 1 + 2)


def test_a_renderer_that_cannot_start_is_one_line(folder: RunFolder) -> None:
    class Failing:
        def iter_rows(self) -> Iterator[Any]:
            raise RuntimeError(
                "The actor died because of an error raised in its creation task, ray::MapWorker(MapBatches(RenderPrompts))"
                "\n  File rendering.py\nselma_ray.errors.ConfigError: sampling.scheduler must be one that fits"
            )
            yield

    with pytest.raises(
        RenderError, match=r"a renderer cannot start: \S+ConfigError: sampling.scheduler must .* fits; fix"
    ):
        list(follow(Failing(), folder, ImagesConfig(), total=8))


def test_too_many_failures_stop_the_stream_at_once(folder: RunFolder) -> None:
    stream = Stream(None, "ValueError: no", None, "ValueError: no", None, None)
    with pytest.raises(
        RenderError, match=r"max_failed_fraction allows 0.2, 2 of 8 images failed \(2 x ValueError: no\)"
    ):
        list(follow(stream, folder, ImagesConfig(max_failed_fraction=0.2), total=8))
    assert stream.taken == 4
    assert (read_progress(folder).failed, read_progress(folder).ended) == (2, False)
