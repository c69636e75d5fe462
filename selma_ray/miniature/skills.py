"""The five skills of the miniature and the scenes and captions that belong to each."""

import hashlib
import random
from collections.abc import Callable

from selma_ray.miniature.captions import normalise_caption, write_caption
from selma_ray.miniature.scenes import BACKGROUNDS, RELATIONS, STYLES, Group, Relation, Scene
from selma_ray.miniature.sprites import COLOURS, NATURAL_COLOUR, OBJECTS
from selma_ray.miniature.usual import USUAL_COLOURS

__all__ = ["SKILLS", "USUAL_COLOURS", "any_colour", "is_test_caption", "sample_caption", "sample_scene"]

_TEST_SHARE = 16


def is_test_caption(caption: str) -> bool:
    """Tell whether a caption is kept for tests: one in sixteen, chosen by the hash of its normal form."""
    digest = hashlib.sha256(normalise_caption(caption).encode()).digest()
    return digest[0] % _TEST_SHARE == 0


def sample_scene(skill: str, rng: random.Random) -> Scene:
    """Draw a scene that a skill is about."""
    return _SAMPLERS[skill](rng)


def sample_caption(skill: str, rng: random.Random, *, test: bool | None = None) -> str:
    """Draw a caption of a skill; `test` keeps to test captions (True) or to the others (False)."""
    while True:
        caption = write_caption(sample_scene(skill, rng), rng, long=skill == "paragraphs")
        if test is None or is_test_caption(caption) == test:
            return caption


def _usual_colour(name: str, rng: random.Random) -> str:
    """Draw a colour in which one meets an object, the natural one most often."""
    return NATURAL_COLOUR[name] if rng.random() < 0.6 else rng.choice(USUAL_COLOURS[name])


def _unusual_colour(name: str, rng: random.Random) -> str:
    """Draw a colour in which one does not meet an object."""
    return rng.choice([colour for colour in COLOURS if colour not in USUAL_COLOURS[name]])


def _groups(
    counts: tuple[int, ...], colour_of: Callable[[str, random.Random], str], rng: random.Random
) -> tuple[Group, ...]:
    names = rng.sample(OBJECTS, len(counts))
    return tuple(Group(name, colour_of(name, rng), count) for name, count in zip(names, counts, strict=True))


def _sample_common(rng: random.Random) -> Scene:
    counts = rng.choices(((1,), (2,), (1, 1), (2, 1)), (4, 1, 5, 1))[0]
    background = rng.choice(BACKGROUNDS[1:]) if rng.random() < 0.3 else "plain"
    return Scene(_groups(counts, _usual_colour, rng), _relation(counts, 0.7, rng), background)


def _sample_paragraphs(rng: random.Random) -> Scene:
    counts = rng.choices(((1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (3,)), (5, 2, 2, 1, 1, 1))[0]
    colour_of = _usual_colour if rng.random() < 0.6 else any_colour
    style = rng.choice(STYLES[1:]) if rng.random() < 0.3 else "drawing"
    background = rng.choice(BACKGROUNDS[1:]) if rng.random() < 0.8 else "plain"
    return Scene(_groups(counts, colour_of, rng), _relation(counts, 0.9, rng), background, style)


def _sample_counting(rng: random.Random) -> Scene:
    counts = rng.choices(((2,), (3,), (4,), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)), (3, 4, 3, 1, 1, 2, 2, 2))[0]
    background = rng.choice(BACKGROUNDS[1:]) if rng.random() < 0.2 else "plain"
    return Scene(_groups(counts, _usual_colour, rng), _relation(counts, 0.5, rng), background)


def _sample_unusual(rng: random.Random) -> Scene:
    counts = rng.choices(((1,), (2,), (1, 1), (2, 1)), (3, 1, 5, 1))[0]
    background = rng.choice(BACKGROUNDS[1:]) if rng.random() < 0.3 else "plain"
    return Scene(_groups(counts, _unusual_colour, rng), _relation(counts, 0.6, rng), background)


def _sample_style(rng: random.Random) -> Scene:
    counts = rng.choices(((1,), (2,), (1, 1), (2, 1)), (4, 2, 4, 1))[0]
    background = rng.choice(BACKGROUNDS[1:]) if rng.random() < 0.3 else "plain"
    groups = _groups(counts, _usual_colour, rng)
    return Scene(groups, _relation(counts, 0.5, rng), background, rng.choice(STYLES[1:]))


def any_colour(name: str, rng: random.Random) -> str:
    """Draw any colour."""
    return rng.choice(list(COLOURS))


def _relation(counts: tuple[int, ...], chance: float, rng: random.Random) -> Relation | None:
    return rng.choice(RELATIONS) if len(counts) == 2 and rng.random() < chance else None


_SAMPLERS: dict[str, Callable[[random.Random], Scene]] = {
    "common": _sample_common,
    "paragraphs": _sample_paragraphs,
    "counting": _sample_counting,
    "unusual": _sample_unusual,
    "style": _sample_style,
}
SKILLS: tuple[str, ...] = tuple(_SAMPLERS)
