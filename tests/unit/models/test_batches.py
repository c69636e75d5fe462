"""Batches that do not fit, and batches that one item makes fail."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from selma_ray.models.batches import HalvingBatches, is_out_of_memory, render_each, spare_others


def test_halved_batches_stay_halved() -> None:
    seen: list[int] = []

    def double(batch: Any) -> Any:
        seen.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in batch]

    batches = HalvingBatches(8)
    assert batches.map(double, range(10)) == [2 * item for item in range(10)]
    assert seen == [8, 4, 2, 2, 2, 2, 2]
    assert batches.size == 2
    with pytest.raises(torch.OutOfMemoryError):
        batches.map(lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")), [1, 2])
    with pytest.raises(ValueError, match="another fault"):
        HalvingBatches(4).map(lambda batch: (_ for _ in ()).throw(ValueError("another fault")), [1, 2, 3])


def test_memory_of_a_batch_that_did_not_fit_is_free_when_a_smaller_one_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[weakref.ref] = []
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(kept[0]() is None))

    def fill(batch: Sequence[int]) -> Sequence[int]:
        filled = torch.zeros(len(batch))
        if len(batch) > 1:
            kept.append(weakref.ref(filled))
            raise torch.OutOfMemoryError("no")
        return batch

    gc.disable()  # what is freed is freed by HalvingBatches
    try:
        assert HalvingBatches().map(fill, [1, 2]) == [1, 2]
    finally:
        gc.enable()
    assert freed == [True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_only_the_row_at_fault_has_an_error_and_is_tried_again() -> None:
    calls: list[list[str]] = []

    def render(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        calls.append(list(prompts))
        if "bad" in prompts:
            raise ValueError("no such thing")
        return [Image.new("RGB", (1, 1), (seed, 0, 0)) for seed in seeds]

    good, bad, last = render_each(render, ["good", "bad", "last"], [1, 2, 3], attempts=2)
    assert isinstance(good, Image.Image)
    assert isinstance(last, Image.Image)
    assert (good.getpixel((0, 0)), last.getpixel((0, 0))) == ((1, 0, 0), (3, 0, 0))
    assert str(bad) == "no such thing"
    assert bad.__traceback__ is None  # type: ignore[union-attr]
    assert calls == [["good", "bad", "last"], ["good"], ["bad"], ["bad"], ["last"]]


def test_others_are_spared_by_halves() -> None:
    def double(items: Sequence[int]) -> list[int]:
        if 3 in items:
            raise ValueError("three")
        return [2 * item for item in items]

    results = spare_others(double, [1, 2, 3, 4])
    assert [str(result) for result in results] == ["2", "4", "three", "8"]
