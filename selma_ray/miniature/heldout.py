"""Five hundred fixed captions that no training pair uses: the set on which base scores are reported."""

import random
from functools import cache

from selma_ray.miniature.skills import SKILLS, sample_caption

__all__ = ["CAPTIONS_PER_SKILL", "heldout_by_skill"]

CAPTIONS_PER_SKILL = 100
_SEED = 20240311


@cache
def heldout_by_skill() -> dict[str, tuple[str, ...]]:
    """Return 100 different test captions of each skill; no caption is in two skills."""
    chosen: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for skill in SKILLS:
        rng = random.Random(f"{_SEED} {skill}")
        captions: list[str] = []
        while len(captions) < CAPTIONS_PER_SKILL:
            caption = sample_caption(skill, rng, test=True)
            if caption not in seen:
                seen.add(caption)
                captions.append(caption)
        chosen[skill] = tuple(captions)
    return chosen
