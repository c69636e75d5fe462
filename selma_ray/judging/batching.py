"""Batches on a device whose memory may not hold them."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["HalvingBatches", "is_out_of_memory", "spare_others"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class HalvingBatches:
    """Maps batches of at most `size` items; a batch that does not fit into memory is halved, and so are all that follow."""

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """Return one result an item, in order; raises what `function` raises where a single item does not fit."""
        results: list[Result] = []
        while len(results) < len(items):
            batch = items[len(results) : len(results) + self.size]
            try:
                results += function(batch)
                continue
            except Exception as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
            # Only here, where the error and the tensors of its frames are gone, can their memory be given back.
            self.size = len(batch) // 2
            logger.warning("a batch of %d did not fit into memory, going on with %d", len(batch), self.size)
            _free_device_memory()
        return results


def spare_others(
    function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> list[Result | Exception]:
    """Return one result an item; a batch that fails is halved until only the items that make it fail are its exceptions."""
    if not items:
        return []
    try:
        return list(function(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return spare_others(function, items[:half]) + spare_others(function, items[half:])


def is_out_of_memory(error: Any) -> bool:
    """Return whether an error says that the device, or the machine, has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in ("out of memory", "can't allocate memory"))
    )


def _free_device_memory() -> None:
    import torch

    torch.cuda.empty_cache()  # does nothing where CUDA was not started
