"""The training pairs: a long-tailed mix of scenes, and captions of which a stated share is loose, as on the web."""

import random
from dataclasses import dataclass, replace

from selma_ray.miniature.captions import write_paragraph, write_phrase
from selma_ray.miniature.facts import Facts, GroupFacts, state_facts
from selma_ray.miniature.scenes import MAX_OBJECTS, RELATIONS, Scene
from selma_ray.miniature.skills import is_test_caption, sample_scene
from selma_ray.miniature.sprites import COLOURS, OBJECTS

__all__ = ["LOOSE_SHARE", "SKILL_SHARES", "Looseness", "loosen", "sample_web_scene", "write_web_caption"]

# Plain scenes in natural colours dominate; what SELMA's skills ask for is rare.
SKILL_SHARES: dict[str, float] = {"common": 0.60, "counting": 0.12, "unusual": 0.10, "style": 0.09, "paragraphs": 0.09}
LOOSE_SHARE = 0.35


@dataclass(frozen=True)
class Looseness:
    """How far captions are from their images: the share of them that is loose, and at most how many edits such a one has."""

    share: float = LOOSE_SHARE
    max_edits: int = 1


_LOOSE_EDITS: dict[str, float] = {
    "wrong_count": 0.30,
    "wrong_colour": 0.17,
    "missing_colour": 0.15,
    "wrong_relation": 0.18,
    "missing_relation": 0.07,
    "missing_setting": 0.05,
    "missing_object": 0.05,
    "wrong_object": 0.03,
}


def sample_web_scene(rng: random.Random) -> tuple[Scene, bool]:
    """Draw a scene of the mix, and whether its captions are paragraphs."""
    skill = rng.choices(list(SKILL_SHARES), list(SKILL_SHARES.values()))[0]
    return sample_scene(skill, rng), skill == "paragraphs"


def write_web_caption(scene: Scene, rng: random.Random, *, long: bool, looseness: Looseness | None = None) -> str:
    """Describe a scene as the web does, loosely at times; never with a test caption."""
    looseness = looseness or Looseness()
    while True:
        facts = state_facts(scene, rng)
        if rng.random() < looseness.share:
            for _ in range(rng.randint(1, looseness.max_edits) if looseness.max_edits > 1 else 1):
                facts = loosen(facts, rng)
        caption = write_paragraph(facts, rng) if long else write_phrase(facts, rng)
        if not is_test_caption(caption):
            return caption


def loosen(facts: Facts, rng: random.Random) -> Facts:
    """Make one statement of a caption wrong or leave one out."""
    while True:
        edit = rng.choices(list(_LOOSE_EDITS), list(_LOOSE_EDITS.values()))[0]
        edited = _edit_setting(facts, edit) if edit == "missing_setting" else _edit(facts, edit, rng)
        if edited != facts:
            return edited


def _edit(facts: Facts, edit: str, rng: random.Random) -> Facts:
    if edit == "wrong_relation":
        others = [relation for relation in RELATIONS if relation != facts.relation]
        return replace(facts, relation=rng.choice(others)) if facts.relation else facts
    if edit == "missing_relation":
        return replace(facts, relation=None)
    place = rng.randrange(len(facts.groups))
    if edit == "missing_object":
        kept = tuple(group for index, group in enumerate(facts.groups) if index != place)
        return replace(facts, groups=kept, relation=None) if kept else facts
    groups = list(facts.groups)
    groups[place] = _edit_group(facts, groups[place], edit, rng)
    return replace(facts, groups=tuple(groups))


def _edit_group(facts: Facts, group: GroupFacts, edit: str, rng: random.Random) -> GroupFacts:
    if edit == "missing_colour":
        return replace(group, colour=None)
    if edit == "wrong_colour":
        return replace(group, colour=rng.choice([colour for colour in COLOURS if colour != group.colour]))
    if edit == "wrong_object":
        used = {other.object for other in facts.groups}
        return replace(group, object=rng.choice([name for name in OBJECTS if name not in used]))
    rest = sum(other.count for other in facts.groups) - group.count
    limit = MAX_OBJECTS - rest
    near = [count for count in (group.count - 1, group.count + 1) if 1 <= count <= limit]
    count = rng.choice(near) if near else group.count
    return replace(group, count=count, counted=count > 1)


def _edit_setting(facts: Facts, edit: str) -> Facts:
    return replace(facts, background=None, style=None)
