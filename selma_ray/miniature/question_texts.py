"""Every question that the miniature's grammar can ask, each under the key of what it is about.

Keys: (whole, o), (how_many, o), (color, o, c), (count, o, n), (spatial, o, p, r), (background, b), (style, s), where o and p are places in
OBJECTS, c in COLOURS, r in RELATIONS, b in BACKGROUNDS, s in STYLES, and n is a number of objects.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from selma_ray.miniature.facts import COUNT_WORDS, RELATION_PHRASES, with_article
from selma_ray.miniature.questions import STYLE_NAMES
from selma_ray.miniature.scenes import BACKGROUNDS, RELATIONS, STYLES
from selma_ray.miniature.sprites import COLOURS, OBJECTS, plural

__all__ = ["QuestionKey", "every_question", "key_of_question"]

QuestionKey = tuple[Any, ...]
_RELATION_OF = {name: place for place, name in enumerate(RELATIONS)}


def every_question() -> Iterator[tuple[QuestionKey, tuple[str, ...]]]:
    """Yield each key with all wordings of its question."""
    for o, name in enumerate(OBJECTS):
        many = plural(name)
        yield ("whole", o), (f"Is there {with_article(name)}?", f"Are there {many}?")
        yield ("how_many", o), (f"How many {many} are there?",)
        for c, colour in enumerate(COLOURS):
            yield ("color", o, c), (f"Is the {name} {colour}?", f"Are the {many} {colour}?")
        for count, word in COUNT_WORDS.items():
            noun, verb = (name, "Is") if count == 1 else (many, "Are")
            yield ("count", o, count), (f"{verb} there exactly {word} {noun}?",)
        for p, other in enumerate(OBJECTS):
            if p != o:
                yield from _relations(o, p, name, other)
    for b, background in enumerate(BACKGROUNDS):
        named = background if background == "snow" else with_article(background)
        text = "Is the background plain?" if background == "plain" else f"Is there {named} in the background?"
        yield ("background", b), (text,)
    for s, style in enumerate(STYLES):
        yield ("style", s), (f"Is the picture {with_article(STYLE_NAMES[style])}?",)


def key_of_question(text: str) -> QuestionKey | None:
    """Return what a question is about, however it is capitalised; None for one outside the grammar."""
    return _keys().get(text.strip().lower())


@cache
def _keys() -> dict[str, QuestionKey]:
    return {text.lower(): key for key, texts in every_question() for text in texts}


def _relations(o: int, p: int, name: str, other: str) -> Iterator[tuple[QuestionKey, tuple[str, ...]]]:
    for relation, phrases in RELATION_PHRASES.items():
        texts = [
            f"{verb} the {first} {phrases[0]} the {second}?"
            for verb, first in (("Is", name), ("Are", plural(name)))
            for second in (other, plural(other))
        ]
        yield ("spatial", o, p, _RELATION_OF[relation]), tuple(texts)
