"""Reading an LLM's answer: a numbered list that goes on from the request's examples."""

import re
from dataclasses import dataclass

__all__ = ["ListItem", "parse_numbered_list"]

# "4.", "4)", "(4)", "4:", "#4", or a bullet, and what follows it.
_MARKED = re.compile(r"^\s*(?:#?\(?\d{1,4}[.):]|[-*•–])\s*(?P<text>.*)$")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`", "**": "**"}


@dataclass(frozen=True)
class ListItem:
    """One line of an answer: an item of the list, or a line that is none (`parsed` is false)."""

    text: str
    parsed: bool


def parse_numbered_list(answer: str) -> list[ListItem]:
    """Return the lines of an answer to a request that ended in the number of the first item.

    The first line is the first item. Blank lines are skipped; bullets, `4)` and restarted numbers are items like any
    others; a line without a marker (a preamble, a remark) or without text is returned as not parsed, so that nothing is
    lost unseen.
    """
    first, *lines = answer.split("\n")
    items = [ListItem(_unquoted(first), parsed=True)] if first.strip() else []
    for line in lines:
        marked = _MARKED.match(line)
        if marked and _unquoted(marked["text"]):
            items.append(ListItem(_unquoted(marked["text"]), parsed=True))
        elif line.strip():
            items.append(ListItem(line.strip(), parsed=False))
    return items


def _unquoted(text: str) -> str:
    text = " ".join(text.split())
    for opening, closing in _QUOTES.items():
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip()
    return text
