"""Captions of scenes: short phrases and paragraphs of several sentences, and the way back from a caption to its scene."""

import random

from selma_ray.miniature.facts import (
    BACKGROUND_PHRASES,
    RELATION_PHRASES,
    STYLE_PHRASES,
    Facts,
    GroupFacts,
    noun_phrase,
    state_facts,
)
from selma_ray.miniature.grammar import caption_grammar
from selma_ray.miniature.parsing import normalise_caption, parse_caption, parse_facts
from selma_ray.miniature.scenes import Scene

__all__ = [
    "MAX_WORDS",
    "caption_grammar",
    "normalise_caption",
    "parse_caption",
    "parse_facts",
    "write_caption",
    "write_paragraph",
    "write_phrase",
]

MAX_WORDS = 50


def write_caption(scene: Scene, rng: random.Random, *, long: bool = False) -> str:
    """Describe a scene in one phrase, or in several sentences when `long`; `parse_caption` gives the scene back."""
    facts = state_facts(scene, rng)
    return write_paragraph(facts, rng) if long else write_phrase(facts, rng)


def write_phrase(facts: Facts, rng: random.Random) -> str:
    """Write facts as one phrase, such as "a pencil sketch of two apples to the left of a car on a beach"."""
    words = noun_phrase(facts.groups[0])
    if len(facts.groups) == 2:
        link = rng.choice(RELATION_PHRASES[facts.relation]) if facts.relation else "and"
        words += f" {link} {noun_phrase(facts.groups[1])}"
    if facts.background:
        words += " " + rng.choice(BACKGROUND_PHRASES[facts.background])
    if facts.style:
        style = rng.choice(STYLE_PHRASES[facts.style])
        return f"{style} of {words}" if rng.random() < 0.75 else f"{words}, as {style}"
    opening = rng.random()
    if opening < 0.15:
        return f"a picture of {words}"
    if opening < 0.3:
        return f"there {_be(facts.groups[0])} {words}"
    return words


def write_paragraph(facts: Facts, rng: random.Random) -> str:
    """Write facts as two to six sentences of at most `MAX_WORDS` words in all."""
    sentences = _introduce(facts, rng)
    closing = []
    if facts.background:
        lead = rng.choice(("Everything is", "The scene is set", "All of this is"))
        closing.append(f"{lead} {rng.choice(BACKGROUND_PHRASES[facts.background])}.")
    if facts.style:
        lead = rng.choice(("It is", "The picture is", "The whole picture is drawn as"))
        closing.append(f"{lead} {rng.choice(STYLE_PHRASES[facts.style])}.")
    rng.shuffle(closing)
    return " ".join(sentences + closing)


def _introduce(facts: Facts, rng: random.Random) -> list[str]:
    """Name the groups; colours stand beside the noun or in a sentence of their own."""
    first, *rest = facts.groups
    asides: list[str] = []
    opening = rng.choice(("The picture shows", "This picture shows", "We see", f"In this picture there {_be(first)}"))
    sentences = [f"{opening} {_mention(first, asides, rng)}"]
    if not rest:
        return [sentences[0] + ".", *asides]
    second = _mention(rest[0], asides, rng)
    link = rng.choice(RELATION_PHRASES[facts.relation]) if facts.relation else None
    if link is None:
        sentences = [f"{sentences[0]} and {second}.", *asides]
    elif rng.random() < 0.5:
        pronoun = "It is" if first.count == 1 else "They are"
        sentences = [f"{sentences[0]}.", f"{pronoun} {link} {second}.", *asides]
    else:
        sentences = [f"{sentences[0]} and {second}.", *asides]
        sentences.append(f"The {first.name} {_be(first)} {link} the {rest[0].name}.")
    return sentences


def _mention(group: GroupFacts, asides: list[str], rng: random.Random) -> str:
    if group.colour and rng.random() < 0.3:
        asides.append(f"The {group.name} {_be(group)} {group.colour}.")
        return noun_phrase(GroupFacts(group.object, None, group.count, group.counted))
    return noun_phrase(group)


def _be(group: GroupFacts) -> str:
    return "is" if group.count == 1 else "are"
