"""The miniature's one door: captions, their questions and their scenes, for whoever knows nothing of its grammar."""

import random

from PIL import Image

from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.known_scenes import DrawnScene, draw_known_scenes
from selma_ray.miniature.parsing import normalise_caption, parse_caption
from selma_ray.miniature.questions import GrammarQuestion, questions_for
from selma_ray.miniature.scenes import render_scene
from selma_ray.miniature.skills import SKILLS, sample_caption

__all__ = [
    "SKILLS",
    "DrawnScene",
    "GrammarQuestion",
    "draw_caption",
    "draw_known_scenes",
    "heldout_by_skill",
    "normalise_caption",
    "questions_for",
    "sample_captions",
]

_MOST_DRAWS = 100  # draws for each caption kept, before a skill is said to have no more


def sample_captions(skill: str, count: int, seed: int, seen: set[str]) -> list[str]:
    """Return up to `count` captions of a skill that are not in `seen` (normalised captions), and add them to it."""
    rng = random.Random(seed)
    captions: list[str] = []
    for _ in range(_MOST_DRAWS * count):
        if len(captions) == count:
            break
        caption = sample_caption(skill, rng, test=False)
        if (normal := normalise_caption(caption)) not in seen:
            seen.add(normal)
            captions.append(caption)
    return captions


def draw_caption(caption: str, seed: int) -> Image.Image:
    """Return the scene that a caption states (RGB, 64 x 64); raises CaptionError for one outside the grammar."""
    return render_scene(parse_caption(caption), random.Random(seed))
