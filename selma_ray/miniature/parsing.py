"""Reading captions: from text to the facts it states, with a reason when a caption is outside the grammar."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from selma_ray.errors import CaptionError
from selma_ray.miniature.facts import COUNT_WORDS, RELATION_PHRASES, Facts, GroupFacts
from selma_ray.miniature.scenes import INVERSE, MAX_OBJECTS, Relation, Scene
from selma_ray.miniature.sprites import COLOURS, OBJECTS, plural

__all__ = ["normalise_caption", "parse_caption", "parse_facts"]

_FILLERS = frozenset(
    {"of", "as", "in", "on", "under", "at", "with", "there", "is", "are", "also", "this", "picture", "image", "shows"}
    | {"we", "see", "scene", "set", "whole", "drawn", "everything", "all", "background", "simple", "wooden", "art"}
    | {"style", "plain"}
)
_PRONOUNS = ("it", "they")


@dataclass(frozen=True)
class _Lexeme:
    kind: str
    value: Any = None


@dataclass(frozen=True)
class _Mention:
    """A noun phrase: `count` is None in "the apples"."""

    object: str
    colour: str | None
    count: int | None
    counted: bool


def _build_lexicon() -> dict[tuple[str, ...], _Lexeme]:
    lexicon: dict[tuple[str, ...], _Lexeme] = {(word,): _Lexeme("filler") for word in _FILLERS}
    lexicon |= {(word,): _Lexeme("pronoun") for word in _PRONOUNS}
    lexicon |= {
        ("a",): _Lexeme("article"),
        ("an",): _Lexeme("article"),
        ("the",): _Lexeme("the"),
        ("and",): _Lexeme("and"),
    }
    lexicon |= {(word,): _Lexeme("count", count) for count, word in COUNT_WORDS.items()}
    lexicon |= {(str(count),): _Lexeme("count", count) for count in COUNT_WORDS}
    lexicon |= {(name,): _Lexeme("colour", name) for name in COLOURS}
    for relation, phrases in RELATION_PHRASES.items():
        lexicon |= {tuple(phrase.split()): _Lexeme("relation", relation) for phrase in phrases}
    for name in OBJECTS:
        lexicon[(plural(name),)] = _Lexeme("noun", (name, True))
        lexicon[(name,)] = _Lexeme("noun", (name, False))
    for words, name in (
        ("plain background", "plain"),
        ("meadow", "meadow"),
        ("beach", "beach"),
        ("night sky", "night sky"),
        ("snow", "snow"),
        ("table", "table"),
    ):
        lexicon[tuple(words.split())] = _Lexeme("background", name)
    for words, name in (
        ("drawing", "drawing"),
        ("pencil sketch", "pencil sketch"),
        ("sketch", "pencil sketch"),
        ("pixel art", "pixel art"),
        ("watercolor painting", "watercolor"),
        ("watercolor", "watercolor"),
    ):
        lexicon[tuple(words.split())] = _Lexeme("style", name)
    return lexicon


_LEXICON = _build_lexicon()
_LONGEST = max(len(words) for words in _LEXICON)


def normalise_caption(text: str) -> str:
    """Lower the case, drop commas and a final full stop, and make every space single."""
    return re.sub(r"[\s,]+", " ", text.lower()).strip(" .")


def parse_caption(text: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        CaptionError: when the caption is outside the grammar, with the reason in one line.
    """
    return parse_facts(text).to_scene()


def parse_facts(text: str) -> Facts:
    """Return what a caption states, sentence by sentence.

    Raises:
        CaptionError: when the caption is outside the grammar, with the reason in one line.
    """
    reader = _Reader()
    for sentence in re.split(r"[.;!]+", normalise_caption(text)):
        reader.read(_lex(sentence))
    return reader.finish()


def _lex(sentence: str) -> list[_Lexeme]:
    words = sentence.split()
    lexemes, start = [], 0
    while start < len(words):
        for length in range(min(_LONGEST, len(words) - start), 0, -1):
            lexeme = _LEXICON.get(tuple(words[start : start + length]))
            if lexeme is not None:
                lexemes.append(lexeme)
                start += length
                break
        else:
            raise CaptionError(
                f"caption: unknown word {words[start]!r}; known objects are {', '.join(OBJECTS)}; "
                f"known colours are {', '.join(COLOURS)}"
            )
    return [lexeme for lexeme in lexemes if lexeme.kind != "filler"]


@dataclass
class _Reader:
    """Collects the facts of one caption."""

    groups: list[GroupFacts] = field(default_factory=list)
    relation: Relation | None = None
    background: str | None = None
    style: str | None = None

    def read(self, lexemes: list[_Lexeme]) -> None:
        """Take in one sentence."""
        parts: list[Any] = []
        determiner: _Lexeme | None = None
        colour: str | None = None
        for lexeme in lexemes:
            if lexeme.kind in ("article", "the", "count"):
                determiner = lexeme
            elif lexeme.kind == "colour":
                if colour is not None:
                    raise CaptionError(f"caption: expected an object after {colour!r}, got {lexeme.value!r}")
                colour = lexeme.value
            elif lexeme.kind == "noun":
                parts.append(_mention(determiner, colour, *lexeme.value))
                determiner, colour = None, None
            elif lexeme.kind == "background":
                self.background = _agree("background", self.background, lexeme.value)
            elif lexeme.kind == "style":
                self.style = _agree("style", self.style, lexeme.value)
            else:
                parts.append(lexeme)
        self._combine(parts, colour)

    def finish(self) -> Facts:
        """Check the whole and return it."""
        if not self.groups:
            raise CaptionError(f"caption: names no object; expected one or two of {', '.join(OBJECTS)}")
        total = sum(group.count for group in self.groups)
        if total > MAX_OBJECTS:
            raise CaptionError(f"caption: at most {MAX_OBJECTS} objects fit a scene, got {total}")
        return Facts(tuple(self.groups), self.relation, self.background, self.style)

    def _combine(self, parts: list[Any], predicate: str | None) -> None:
        shape = " ".join("noun" if isinstance(part, _Mention) else part.kind for part in parts)
        if shape in ("", "pronoun") and predicate is None:
            return
        if shape == "noun" and predicate is not None and parts[0].colour is None:
            self._enter(replace(parts[0], colour=predicate))
        elif shape == "noun" and predicate is None:
            self._enter(parts[0])
        elif shape == "noun and noun" and predicate is None:
            self._enter(parts[0])
            self._enter(parts[2])
        elif shape == "noun relation noun" and predicate is None:
            self._relate(self._enter(parts[0]), parts[1].value, self._enter(parts[2]))
        elif shape == "pronoun relation noun" and predicate is None and self.groups:
            self._relate(0, parts[1].value, self._enter(parts[2]))
        else:
            raise CaptionError(
                "caption: expected 'OBJECT', 'OBJECT and OBJECT', 'OBJECT RELATION OBJECT' or 'the OBJECT is COLOUR' in each "
                f"sentence, got '{shape or predicate}'; relations are {', '.join(p[0] for p in RELATION_PHRASES.values())}"
            )

    def _enter(self, mention: _Mention) -> int:
        """Add a mention's group, or what it adds to a group named before; return the group's place."""
        for place, group in enumerate(self.groups):
            if group.object != mention.object:
                continue
            if mention.count is not None:
                raise CaptionError(f"caption: {group.object!r} is named twice; use two different objects")
            if mention.colour is not None:
                self.groups[place] = replace(group, colour=_agree(group.object, group.colour, mention.colour))
            return place
        if len(self.groups) == 2:
            raise CaptionError(f"caption: at most two kinds of objects fit a scene, got a third: {mention.object!r}")
        self.groups.append(GroupFacts(mention.object, mention.colour, mention.count or 1, mention.counted))
        return len(self.groups) - 1

    def _relate(self, first: int, relation: Relation, second: int) -> None:
        if first == second:
            raise CaptionError(f"caption: {self.groups[first].object!r} cannot be {relation.replace('_', ' ')} itself")
        stated = relation if first == 0 else INVERSE[relation]
        self.relation = _agree("relation", self.relation, stated)


def _mention(determiner: _Lexeme | None, colour: str | None, name: str, is_plural: bool) -> _Mention:
    if determiner is not None and determiner.kind == "count":
        return _Mention(name, colour, determiner.value, counted=True)
    if determiner is not None and determiner.kind == "the":
        return _Mention(name, colour, None, counted=False)
    if determiner is None and is_plural and plural(name) != name:
        raise CaptionError(f"caption: {plural(name)!r} needs a number; write 'two {plural(name)}'")
    return _Mention(name, colour, 1, counted=False)


def _agree(what: str, known: Any, stated: Any) -> Any:
    if known is not None and known != stated:
        raise CaptionError(f"caption: {what} is stated twice, as {known!r} and as {stated!r}")
    return stated
