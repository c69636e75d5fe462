"""Reading an LLM's answer: a numbered list that goes on from the request's examples."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Literal

from selma_ray.models.thinking import split_thoughts
from selma_ray.words import has_letter_or_digit

__all__ = ["ListItem", "parse_numbered_list"]

_GAP = r"[\s\u200b\u2060\ufeff]*"
# "4.", "4)", "(4)", "4:", "#4.", "### 4.", "4.)", "4 -", "4、", "（4）", each perhaps in bold; never the 4 of "4.5 litres".
_NUMBER = r"(?:\#{1,6}\s+)?(?:\*\*|__)?\#?[(\[（【]?\d{1,4}(?:\*\*|__)?(?:[.):\]、．。：）】]+(?!\d)|\s+[-–—]\s(?!\s*\d)|\ufe0f?\u20e3)"
_BULLET = r"[-–](?![-–])|[•‣▪●○◦・⁃]|[+—](?=\s)|\*(?=\s|[^*]*$)"
_MARKED = re.compile(rf"{_GAP}(?:(?P<number>{_NUMBER})|{_BULLET})(?P<text>.*)$")
_TITLE = re.compile(r"\s*(\*\*|__)(?P<title>(?:(?!\1).)+)\1\s*:?\s*")
# Words before a colon that begin a remark about the list, in the languages that models answer in most.
_NOTE = re.compile(
    r"(?:notes?|remarks?|disclaimer|p\.?\s?s\.?|n\.?b\.?|hinweis|anmerkung|nota|remarque|aviso|observação|примечание|注意?|备注|備註|説明|说明|참고)"
    r"\s*[:：]",
    re.IGNORECASE,
)
# What stands around an item: quotation marks of all styles, and emphasis.
_ENCLOSING = [
    '""', "''", "``", "“”", "”“", "””", "‘’", "’’", "„“", "„”", "‚‘", "‚’", "«»", "»«", "‹›", "›‹", "「」", "『』", "｢｣", "＂＂", "＇＇",
    "〝〞", "〝〟", "❝❞", "❛❜", "**", "__", ("``", "''"), ("__", "__"),
]  # fmt: skip
_APOSTROPHES = "'’"
_SENTENCE_ENDS = ".!?…。！？।۔"
_OPENS_TEXT = "\"'“„«‹「『(（"


@dataclass(frozen=True)
class ListItem:
    """One item of an answer, or one line of what is no item: `parsed` is false there."""

    text: str
    parsed: bool


@dataclass
class _Entry:
    """A line with the lines that belong to it; `text` is the first without its marker."""

    line: str
    text: str
    is_item: bool
    marker: Literal["", "number", "bullet"] = ""
    tail: list[str] = field(default_factory=list)

    @property
    def is_title(self) -> bool:
        """Tell whether what the item says is yet to come: a number alone, or a title in bold."""
        if not self.text.strip():
            return self.marker == "number"
        title = _TITLE.fullmatch(self.text)
        return self.is_item and title is not None and (self.marker != "" or not title["title"].endswith(":"))


def parse_numbered_list(answer: str) -> list[ListItem]:
    """Return the items of an answer to a request that ended in the number of the first, and the lines that are none.

    The first line is the first item, whether or not the LLM wrote its number again; an answer that begins on a line of its own has
    none. Blank lines are skipped; bullets, `4)` and restarted numbers are items like any others. The lines into which an item is
    wrapped are one text, as are a title in bold and the description below it. A line without a marker (a preamble, a remark), a
    heading (it ends in a colon), a note, a line without a letter or digit and what a reasoning model thought are returned as not
    parsed, so that nothing is lost unseen.
    """
    thoughts, said = split_thoughts(answer)
    remarks = [ListItem(line.strip(), parsed=False) for line in thoughts.split("\n") if line.strip()]
    return remarks + [_item(entry) for entry in _with_nested(list(_entries(said)))]


def _entries(said: str) -> Iterator[_Entry]:
    entry: _Entry | None = None
    is_apart = False
    for number, line in enumerate(said.split("\n")):
        if not line.strip():
            is_apart = True
            continue
        if entry and _belongs(line, entry, is_apart):
            entry.tail.append(line.strip())
        else:
            if entry:
                yield entry
            entry = _entry(line, is_first=number == 0)
        is_apart = False
    if entry:
        yield entry


def _entry(line: str, is_first: bool) -> _Entry:
    marked = _MARKED.match(line)
    if marked is None:
        return _Entry(line, line, is_item=is_first)
    return _Entry(line, _without_odd_bold(marked), is_item=True, marker="number" if marked["number"] else "bullet")


def _without_odd_bold(marked: re.Match[str]) -> str:
    """Return the text after a marker; bold that opens before the number, as in "**4. a cat**", opens before the text instead."""
    number, text = marked["number"] or "", marked["text"]
    return next((mark + text.lstrip() for mark in ("**", "__") if number.count(mark) == 1), text)


def _belongs(line: str, entry: _Entry, is_apart: bool) -> bool:
    """Tell whether a line goes on with an entry; `is_apart` says that blank lines stand between them."""
    text = line.strip()
    if not entry.is_item or _MARKED.match(line) or _NOTE.match(_bare(text)) or not _may_go_on(text):
        return False
    said = entry.tail[-1] if entry.tail else entry.text.strip()
    is_indented = _indent(line) >= max(2, _indent(entry.line) + 1)
    if entry.is_title and not entry.tail:
        return is_indented or not is_apart
    if is_apart or (entry.marker != "number" and said.endswith((":", "："))):
        return False
    if is_indented or said.endswith((",", "，", "、", ";", "；")):
        return True
    return unicodedata.category(text[0]) in ("Ll", "Lo") and not said.endswith(tuple(_SENTENCE_ENDS))


def _with_nested(entries: list[_Entry]) -> list[_Entry]:
    """Return entries in which a title has the one bullet below it as its description; one with several is their heading."""
    taken: set[int] = set()
    for position, entry in enumerate(entries):
        if not entry.is_title or entry.tail:
            continue
        below = list(takewhile(partial(_is_below, entry), entries[position + 1 : position + 3]))
        if len(below) == 1:
            entry.tail = [below[0].text.strip(), *below[0].tail]
            taken.add(position + 1)
        elif below:
            entry.is_item = False
    return [entry for position, entry in enumerate(entries) if position not in taken]


def _is_below(title: _Entry, entry: _Entry) -> bool:
    return entry.marker == "bullet" and _indent(entry.line) > _indent(title.line)


def _may_go_on(text: str) -> bool:
    return has_letter_or_digit(text) and (text[0].isalnum() or text[0] in _OPENS_TEXT)


def _indent(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip())


def _item(entry: _Entry) -> ListItem:
    text = _bare(_joined(entry))
    parsed = entry.is_item and has_letter_or_digit(text) and not text.endswith((":", "：")) and not _NOTE.match(text)
    return ListItem(text if parsed else " ".join([entry.line.strip(), *entry.tail]), parsed)


def _joined(entry: _Entry) -> str:
    """Return the lines of an entry as one; a title and its description are put together as models do on one line."""
    text = entry.text.strip()
    if entry.is_title and entry.tail and text:
        title = _TITLE.fullmatch(text)
        text = title["title"].strip() if title else text
        text = text if text.endswith((*_SENTENCE_ENDS, ":", "：")) else f"{text}:"
    for line in entry.tail:
        is_cjk = unicodedata.east_asian_width(text[-1:] or " ") == unicodedata.east_asian_width(line[0]) == "W"
        text += line if is_cjk or re.search(r"\w-$", text) else f" {line}"
    return text


def _bare(text: str) -> str:
    """Return a text without emphasis, repeated spaces and the quotation marks that enclose it as a whole."""
    text = " ".join(text.replace("**", "").strip("\u200b\u2060\ufeff").split())
    whole = text.removesuffix(",")
    for opening, closing in _ENCLOSING:
        inside = whole.removeprefix(opening).removesuffix(closing)
        is_enclosed = len(whole) == len(opening) + len(inside) + len(closing)
        if is_enclosed and inside and not _marks_in(inside, opening + closing):
            return _bare(inside)
    return text


def _marks_in(text: str, marks: str) -> bool:
    """Tell whether a text has one of the marks in it; an apostrophe between letters is none."""
    if set(marks) & set(_APOSTROPHES):
        text = re.sub(rf"(?<=\w)[{_APOSTROPHES}](?=\w)", "", text)
    return any(mark in text for mark in marks)
