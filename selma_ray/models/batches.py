"""Batches that fail: the memory does not hold them, or one item of them is at fault. Loads no torch by itself."""

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from selma_ray.errors import named_line

__all__ = ["HalvingBatches", "Render", "is_out_of_memory", "render_alone", "render_each", "spare_others"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Render = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""Renders prompts from seeds, one image a prompt."""


class HalvingBatches:
    """Maps batches of at most `size` items; a batch that does not fit into memory is halved, and so are all that follow."""

    def __init__(self, size: int = sys.maxsize) -> None:
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device, or the machine, has no memory left."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in ("out of memory", "can't allocate memory"))
    )


def render_each(
    render: Render, prompts: Sequence[str], seeds: Sequence[int], attempts: int = 1
) -> list[Image.Image | Exception]:
    """Return an image or its error for each prompt; where the batch fails, each is rendered alone, up to `attempts` times."""
    try:
        return list(render(prompts, seeds))
    except Exception as error:
        logger.warning(
            "a batch of %d images failed (%s); its rows are tried one by one", len(prompts), named_line(error)
        )
    return [render_alone(render, prompt, seed, attempts) for prompt, seed in zip(prompts, seeds, strict=True)]


def render_alone(render: Render, prompt: str, seed: int, attempts: int) -> Image.Image | Exception:
    """Return one image, or the error of the last of `attempts` (at least 1)."""
    failure: Exception = RuntimeError("not tried")
    for _ in range(attempts):
        try:
            return render([prompt], [seed])[0]
        except Exception as error:
            failure = error.with_traceback(None)  # whose frames may hold what fills the memory
    return failure


def _free_device_memory() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not started
