"""The exact questions that a caption raises, with their dependencies, as in the Davidsonian Scene Graph (DSG)."""

from dataclasses import dataclass

from selma_ray.miniature.facts import COUNT_WORDS, RELATION_PHRASES, Facts, GroupFacts, with_article
from selma_ray.miniature.parsing import parse_facts

__all__ = ["GrammarQuestion", "questions_for", "questions_of_facts"]


_Parents = tuple[int, ...]  # the class below has a field named tuple


@dataclass(frozen=True)
class GrammarQuestion:
    """A yes/no question whose right answer is yes when the image shows what the caption states.

    `parents` holds the ids of the questions whose answer must be yes for this one to make sense; 0 stands for the root.
    `category` is one of whole, color, count, spatial, background, style.
    """

    id: int
    tuple: str
    category: str
    question: str
    parents: _Parents


def questions_for(caption: str, exact_counts: bool = False) -> list[GrammarQuestion]:
    """Return the questions about what a caption states; with `exact_counts` “a hat” is asked to be exactly one.

    Raises:
        CaptionError: when the caption is outside the grammar.
    """
    return questions_of_facts(parse_facts(caption), exact_counts)


def questions_of_facts(facts: Facts, exact_counts: bool = False) -> list[GrammarQuestion]:
    """Return the questions about stated facts; ids count from 1, entities come first."""
    drafts = [_ask_whole(group) for group in facts.groups]
    for parent, group in enumerate(facts.groups, start=1):
        if group.colour:
            drafts.append(_ask_colour(group, parent))
        if group.counted or (exact_counts and group.count == 1):
            drafts.append(_ask_count(group, parent))
    if facts.relation:
        drafts.append(_ask_relation(facts))
    if facts.background:
        drafts.append(_ask_background(facts.background))
    if facts.style:
        style = f"Is the picture {with_article(STYLE_NAMES[facts.style])}?"
        drafts.append((f"global - style ({facts.style})", "style", style, (0,)))
    return [GrammarQuestion(number, *draft) for number, draft in enumerate(drafts, start=1)]


STYLE_NAMES: dict[str, str] = {
    "drawing": "drawing",
    "pencil sketch": "pencil sketch",
    "pixel art": "pixel art picture",
    "watercolor": "watercolor painting",
}

_Draft = tuple[str, str, str, _Parents]


def _ask_whole(group: GroupFacts) -> _Draft:
    question = f"Is there {with_article(group.object)}?" if group.count == 1 else f"Are there {group.name}?"
    return f"entity - whole ({group.name})", "whole", question, (0,)


def _ask_colour(group: GroupFacts, parent: int) -> _Draft:
    verb = "Is" if group.count == 1 else "Are"
    tuple_ = f"attribute - color ({group.name}, {group.colour})"
    return tuple_, "color", f"{verb} the {group.name} {group.colour}?", (parent,)


def _ask_count(group: GroupFacts, parent: int) -> _Draft:
    verb = "Is" if group.count == 1 else "Are"
    question = f"{verb} there exactly {COUNT_WORDS[group.count]} {group.name}?"
    return f"other - count ({group.name}, =={group.count})", "count", question, (parent,)


def _ask_relation(facts: Facts) -> _Draft:
    first, second = facts.groups
    assert facts.relation is not None
    words = RELATION_PHRASES[facts.relation][0]
    verb = "Is" if first.count == 1 else "Are"
    tuple_ = f"relation - spatial ({first.name}, {second.name}, {facts.relation.replace('_', ' ')})"
    return tuple_, "spatial", f"{verb} the {first.name} {words} the {second.name}?", (1, 2)


def _ask_background(background: str) -> _Draft:
    if background == "plain":
        return "attribute - background (plain)", "background", "Is the background plain?", (0,)
    named = background if background == "snow" else with_article(background)
    return f"entity - whole ({background})", "background", f"Is there {named} in the background?", (0,)
