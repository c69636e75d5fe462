"""What a caption states about a scene, and the words it states it with."""

import random
from dataclasses import dataclass

from selma_ray.miniature.scenes import Group, Relation, Scene
from selma_ray.miniature.sprites import NATURAL_COLOUR, plural

__all__ = [
    "BACKGROUND_PHRASES",
    "COUNT_WORDS",
    "RELATION_PHRASES",
    "STYLE_PHRASES",
    "Facts",
    "GroupFacts",
    "noun_phrase",
    "state_facts",
    "with_article",
]

COUNT_WORDS: dict[int, str] = {1: "one", 2: "two", 3: "three", 4: "four"}

# The first phrase of each is the one that questions use.
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left_of": ("to the left of", "left of"),
    "right_of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "underneath"),
}
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background",),
    "meadow": ("in a meadow",),
    "beach": ("on a beach",),
    "night sky": ("under a night sky",),
    "snow": ("in the snow",),
    "table": ("on a table",),
}
STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "drawing": ("a drawing", "a simple drawing"),
    "pencil sketch": ("a pencil sketch", "a sketch"),
    "pixel art": ("a pixel art picture", "a pixel art image"),
    "watercolor": ("a watercolor painting", "a watercolor"),
}


@dataclass(frozen=True)
class GroupFacts:
    """What is said of a group: `colour` is None when unsaid, `counted` is true when a number word says the count."""

    object: str
    colour: str | None = None
    count: int = 1
    counted: bool = False

    @property
    def name(self) -> str:
        """The object's noun, in the plural when there are several."""
        return self.object if self.count == 1 else plural(self.object)


@dataclass(frozen=True)
class Facts:
    """What a caption states; an attribute that it leaves out is None."""

    groups: tuple[GroupFacts, ...]
    relation: Relation | None = None
    background: str | None = None
    style: str | None = None

    def to_scene(self) -> Scene:
        """Fill what is unsaid with the defaults: natural colours, a plain background, a plain drawing."""
        groups = tuple(
            Group(group.object, group.colour or NATURAL_COLOUR[group.object], group.count) for group in self.groups
        )
        return Scene(groups, self.relation, self.background or "plain", self.style or "drawing")


def state_facts(scene: Scene, rng: random.Random, *, verbosity: float = 0.3) -> Facts:
    """Choose what a caption of a scene states: all that differs from the defaults, and defaults with chance `verbosity`."""

    def said(is_default: bool) -> bool:
        return not is_default or rng.random() < verbosity

    groups = tuple(
        GroupFacts(
            group.object,
            group.colour if said(group.colour == NATURAL_COLOUR[group.object]) else None,
            group.count,
            group.count > 1 or rng.random() < verbosity * 0.5,
        )
        for group in scene.groups
    )
    background = scene.background if scene.background != "plain" or rng.random() < verbosity * 0.2 else None
    style = scene.style if scene.style != "drawing" or rng.random() < verbosity * 0.2 else None
    return Facts(groups, scene.relation, background, style)


def with_article(words: str) -> str:
    """Put "a" or "an" before words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(group: GroupFacts) -> str:
    """Write a group as "a blue banana" or "two bananas"."""
    words = f"{group.colour} {group.name}" if group.colour else group.name
    if group.counted or group.count > 1:
        return f"{COUNT_WORDS[group.count]} {words}"
    return with_article(words)
