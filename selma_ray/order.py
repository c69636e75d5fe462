"""The order in which examples, or prompts, are taken: epochs, each a permutation of its own. Loads no torch."""

import numpy as np

from selma_ray.records import seed_of

__all__ = ["batch_positions"]


def batch_positions(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the positions of the global batch of `step` (0, 1, …), a function of its arguments alone.

    Examples are drawn in epochs, each a permutation of its own; a batch may span two, so that none is left out.
    """
    first = step * batch_size
    epochs = range(first // num_examples, (first + batch_size - 1) // num_examples + 1)
    order = np.concatenate([_epoch_order(num_examples, epoch, seed) for epoch in epochs])
    offset = first - epochs.start * num_examples
    return order[offset : offset + batch_size].tolist()


def _epoch_order(num_examples: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, epoch=epoch)).permutation(num_examples)
