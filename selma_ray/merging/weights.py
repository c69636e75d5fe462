"""How much each expert counts: one weight per skill, for the whole denoiser or for each group of its blocks."""

from collections.abc import Mapping, Sequence

from selma_ray.errors import AdapterError

__all__ = ["ALL", "Weights", "block_group", "weights_of"]

ALL = "all"
Weights = Mapping[str, Mapping[str, float]]
"""Group of blocks -> skill -> weight; the group `all` stands for every module that no other group has."""


def block_group(module: str) -> str:
    """Return the group of blocks a module is in: down_blocks, mid_block, up_blocks, transformer_blocks and so on."""
    return module.partition(".")[0]


def weights_of(module: str, weights: Weights, skills: Sequence[str]) -> list[float]:
    """Return the weights of `skills` in one module, in their order."""
    by_skill = weights.get(block_group(module)) or weights.get(ALL)
    if by_skill is None:
        raise AdapterError(
            f"merge weights must cover {module}, they are for {', '.join(weights)}; delete the search's folder and search again"
        )
    return [by_skill[skill] for skill in skills]
