"""Drawn scenes whose truth is known, for asking a judge about them.

Half of the scenes show what their caption states, half differ from it in one thing, as images of an imperfect model do. They are
not passed through an autoencoder, which would make the images more like a model's but may change what they show, and so the truth.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from selma_ray.miniature.facts import Facts
from selma_ray.miniature.parsing import parse_facts
from selma_ray.miniature.scenes import BACKGROUNDS, INVERSE, STYLES, Scene, render_scene
from selma_ray.miniature.sprites import COLOURS

__all__ = ["DrawnScene", "draw_known_scenes", "truths"]

_MOST_OF_TWO_GROUPS = 3  # objects that fit into half a canvas


@dataclass(frozen=True)
class DrawnScene:
    """An image of the caption with this number, and the true answers of the caption's questions, in their order."""

    caption_index: int
    image: Image.Image
    truths: tuple[bool, ...]


def draw_known_scenes(captions: Sequence[str], names: Sequence[str], count: int, seed: int) -> list[DrawnScene]:
    """Draw `count` scenes for the captions in turn, every second one with one thing wrong; a scene depends on its caption's name."""
    scenes = []
    for number in range(count):
        index = number * max(1, len(captions) // count) % len(captions)
        rng = random.Random(f"{seed} {number} {names[index]}")
        facts = parse_facts(captions[index])
        scene = facts.to_scene()
        if len(scene.groups) == 2 and scene.relation is None:
            scene = replace(scene, relation=rng.choice(list(INVERSE)))
        if number % 2:
            scene = _with_a_fault(scene, facts, rng)
        scenes.append(DrawnScene(index, render_scene(scene, rng), truths(facts, scene)))
    return scenes


def truths(facts: Facts, scene: Scene) -> tuple[bool, ...]:
    """Return the true answers of the questions about `facts` (in the order of `questions_of_facts`) for what `scene` shows."""
    shown = {group.object: group for group in scene.groups}
    answers = [group.object in shown for group in facts.groups]
    for group in facts.groups:
        there = shown.get(group.object)
        if group.colour:
            answers.append(there is not None and there.colour == group.colour)
        if group.counted:
            answers.append(there is not None and there.count == group.count)
    if facts.relation:
        first, second = (group.object for group in facts.groups)
        seen = scene.relation if [group.object for group in scene.groups] == [first, second] else None
        answers.append(seen == facts.relation)
    if facts.background:
        answers.append(scene.background == facts.background)
    if facts.style:
        answers.append(scene.style == facts.style)
    return tuple(answers)


def _with_a_fault(scene: Scene, facts: Facts, rng: random.Random) -> Scene:
    """Change one thing that the caption states: a colour, a count, the relation, an object that is missing, the setting."""
    groups = list(scene.groups)
    place = rng.randrange(len(groups))
    most = _MOST_OF_TWO_GROUPS if len(groups) == 2 else _MOST_OF_TWO_GROUPS + 1
    faults = {
        "colour": any(group.colour for group in facts.groups),
        "count": any(group.counted for group in facts.groups),
        "relation": facts.relation is not None,
        "missing": len(groups) == 2,
        "background": facts.background is not None,
        "style": facts.style is not None,
    }
    fault = rng.choice([name for name, possible in faults.items() if possible] or ["colour"])
    if fault == "colour":
        colour = rng.choice([each for each in COLOURS if each != groups[place].colour])
        groups[place] = replace(groups[place], colour=colour)
    elif fault == "count":
        count = rng.choice([each for each in range(1, most + 1) if each != groups[place].count])
        groups[place] = replace(groups[place], count=count)
    elif fault == "missing":
        return replace(scene, groups=(groups[1 - place],), relation=None)
    elif fault == "relation":
        return replace(scene, relation=rng.choice([each for each in INVERSE if each != scene.relation]))
    elif fault == "background":
        return replace(scene, background=rng.choice([each for each in BACKGROUNDS if each != scene.background]))
    else:
        return replace(scene, style=rng.choice([each for each in STYLES if each != scene.style]))
    return replace(scene, groups=tuple(groups))
