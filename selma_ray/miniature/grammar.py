"""Grammars that keep a language model inside the miniature's language, one for each skill.

The text is EBNF as xgrammar reads it. Every grammar is finite: an object cannot be named twice, counts fit the canvas, and
every sentence of it is a caption that `parse_caption` understands.
"""

from collections.abc import Iterable
from functools import cache

from selma_ray.errors import CaptionError
from selma_ray.miniature.facts import (
    BACKGROUND_PHRASES,
    RELATION_PHRASES,
    STYLE_PHRASES,
    GroupFacts,
    noun_phrase,
)
from selma_ray.miniature.scenes import MAX_OBJECTS
from selma_ray.miniature.sprites import COLOURS, OBJECTS
from selma_ray.miniature.usual import USUAL_COLOURS

__all__ = ["caption_grammar"]

_MAX_GENERATED_COUNT = 3
_LINK = " | ".join(f'" {phrase} "' for phrases in RELATION_PHRASES.values() for phrase in phrases)
_SETTING = " | ".join(f'" {phrases[0]}"' for name, phrases in BACKGROUND_PHRASES.items() if name != "plain")
_STYLE = " | ".join(f'"{phrase}"' for name, phrases in STYLE_PHRASES.items() if name != "drawing" for phrase in phrases)


@cache
def caption_grammar(skill: str) -> str:
    """Return the EBNF text that defines a rule `caption`, and the rules it needs, for one of the five skills.

    Raises:
        CaptionError: when the miniature has no such skill.
    """
    if skill not in _WRITERS:
        raise CaptionError(f"skill: the miniature has no grammar for {skill!r}; it has {', '.join(_WRITERS)}")
    return "\n".join(f"{name} ::= {body}" for name, body in _WRITERS[skill]().items()) + "\n"


_Rules = dict[str, str]


def _write_common() -> _Rules:
    groups = {name: _phrases(name, USUAL_COLOURS[name], (1, 2), plain=True) for name in OBJECTS}
    return _joined_rules(groups, '"a picture of "? (one | one_pair) setting?') | {"setting": _SETTING}


def _write_unusual() -> _Rules:
    groups = {}
    for name in OBJECTS:
        colours = [colour for colour in COLOURS if colour not in USUAL_COLOURS[name]]
        groups[name] = _phrases(name, colours, (1, 2), plain=False)
    return _joined_rules(groups, "one setting? | one_pair setting?") | {"setting": _SETTING}


def _write_style() -> _Rules:
    groups = {name: _phrases(name, USUAL_COLOURS[name], (1, 2), plain=True) for name in OBJECTS}
    caption = 'style " of " (one | one_pair) setting? | (one | one_pair) setting? ", as " style'
    return _joined_rules(groups, caption) | {"setting": _SETTING, "style": _STYLE}


def _write_counting() -> _Rules:
    rules: _Rules = {"caption": "(one | one_pair) setting?"}
    counts = range(1, _MAX_GENERATED_COUNT + 1)
    pairs = []
    for name in OBJECTS:
        for count in counts:
            rules[f"{name}_{count}"] = _any(_phrases(name, USUAL_COLOURS[name], (count,), plain=True, counted=True))
            most = min(_MAX_GENERATED_COUNT, MAX_OBJECTS - count)
            pairs.append(f"{name}_{count} link no_{name}_{most}")
        for most in counts:
            rest = [f"{other}_{count}" for other in OBJECTS if other != name for count in range(1, most + 1)]
            rules[f"no_{name}_{most}"] = " | ".join(rest)
    rules["one"] = " | ".join(f"{name}_{count}" for name in OBJECTS for count in counts if count > 1)
    rules["one_pair"] = " | ".join(pairs)
    return rules | {"link": f'{_LINK} | " and "', "setting": _SETTING}


def _write_paragraphs() -> _Rules:
    openings = ("The picture shows ", "This picture shows ", "We see ", "In this picture we see ")
    rules: _Rules = {
        "caption": f'({_any(openings)}) scene "." closing',
        "scene": " | ".join(f"{name}_1 link no_{name} | {name}_head place no_{name}" for name in OBJECTS),
        "place": " | ".join(f'"{phrase} "' for phrases in RELATION_PHRASES.values() for phrase in phrases),
        "closing": '" " setting_sentence (" " style_sentence)? | " " style_sentence " " setting_sentence',
        "setting_sentence": f'("Everything is" | "The scene is set" | "All of this is") ({_SETTING}) "."',
        "style_sentence": f'("It is " | "The picture is " | "The whole picture is drawn as ") ({_STYLE}) "."',
        "link": f'{_LINK} | " and "',
        "colour": _any(COLOURS),
    }
    for name in OBJECTS:
        ones = _phrases(name, list(COLOURS), (1,), plain=False)
        twos = _phrases(name, list(COLOURS), (2,), plain=False)
        rules[f"{name}_1"] = _any(ones + twos)
        aside = _any(_phrases(name, [], (1,), plain=True))
        rules[f"{name}_aside"] = f'({aside}) ". The {name} is " colour'
        heads = f'({_any(ones)} | {name}_aside) ". It is " | ({_any(twos)}) ". They are "'
        rules[f"{name}_head"] = heads
        rules[f"no_{name}"] = " | ".join(f"{other}_1 | {other}_aside" for other in OBJECTS if other != name)
    return rules


def _joined_rules(groups: dict[str, list[str]], caption: str) -> _Rules:
    """One rule an object, one for each object's absence, one group alone and two different groups joined."""
    rules: _Rules = {"caption": caption}
    rules["one"] = " | ".join(groups)
    rules["one_pair"] = " | ".join(f"{name} link no_{name}" for name in groups)
    rules["link"] = f'{_LINK} | " and "'
    for name, phrases in groups.items():
        rules[name] = _any(phrases)
        rules[f"no_{name}"] = " | ".join(other for other in groups if other != name)
    return rules


def _phrases(
    name: str, colours: Iterable[str], counts: Iterable[int], *, plain: bool, counted: bool = False
) -> list[str]:
    """Write an object's noun phrases in some colours and counts, and without a colour when `plain`."""
    shades: list[str | None] = [*([None] if plain else []), *colours]
    return [noun_phrase(GroupFacts(name, shade, count, counted or count > 1)) for count in counts for shade in shades]


def _any(words: Iterable[str]) -> str:
    return " | ".join(f'"{word}"' for word in words)


_WRITERS = {
    "common": _write_common,
    "paragraphs": _write_paragraphs,
    "counting": _write_counting,
    "unusual": _write_unusual,
    "style": _write_style,
}
