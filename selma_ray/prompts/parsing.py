"""Reading an LLM's answer: a numbered list that goes on from the request's examples."""

import re
from dataclasses import dataclass

__all__ = ["ListItem", "parse_numbered_list"]

# "4.", "4)", "(4)", "4:", "#4.", "4.)", each perhaps in bold, or a bullet, and what follows it; never the 4 of "4.5 litres".
_MARKED = re.compile(r"^\s*(?:(?:\*\*)?#?\(?\d{1,4}(?:\*\*)?[.):]+(?!\d)|[-•–]|\*(?!\*))(?P<text>.*)$")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
_END_OF_THOUGHT = "</think>"  # reasoning models think aloud before they answer


@dataclass(frozen=True)
class ListItem:
    """One line of an answer; `parsed` is false where it is no item of the list."""

    text: str
    parsed: bool


def parse_numbered_list(answer: str) -> list[ListItem]:
    """Return the lines of an answer to a request that ended in the number of the first item.

    The first line is the first item, whether or not the LLM wrote its number again; an answer that begins on a line of
    its own has none. Blank lines are skipped; bullets, `4)` and restarted numbers are items like any others. A line
    without a marker (a preamble, a remark), a heading (it ends in a colon), a line without text and what a reasoning
    model thought are returned as not parsed, so that nothing is lost unseen.
    """
    thoughts, end, rest = answer.rpartition(_END_OF_THOUGHT)
    first, *lines = ("\n" + rest if end else answer).split("\n")
    remarks = [ListItem(line.strip(), parsed=False) for line in (thoughts + end).split("\n") if line.strip()]
    items = [_item(first, is_item=True)] if first.strip() else []
    items += [_item(line, is_item=False) for line in lines if line.strip()]
    return remarks + items


def _item(line: str, is_item: bool) -> ListItem:
    """Read one line; `is_item` says that it is an item even without a marker."""
    marked = _MARKED.match(line)
    text = _bare(marked["text"] if marked else line)
    parsed = bool(marked or is_item) and bool(text) and not text.endswith(":")
    return ListItem(text if parsed else line.strip(), parsed)


def _bare(text: str) -> str:
    """Return a text without emphasis, repeated spaces and the quotation marks around it."""
    text = " ".join(text.replace("**", "").split())
    for opening, closing in _QUOTES.items():
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip()
    return text
