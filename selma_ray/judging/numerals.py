"""Numbers in words and in figures."""

import re

__all__ = ["numeral_of", "surface_forms"]

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_UNITS)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_THOUSANDS = {"thousand": 1_000, "million": 1_000_000}


def numeral_of(text: str) -> int | None:
    """Return the number that a text speaks of, such as 21 for "twenty-one cats" and 3 for "3"; None where there is none."""
    total = group = 0
    found = False
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word.isdecimal():
            group, found = group + int(word), True
        elif word in _VALUES:
            group, found = group + _VALUES[word], True
        elif word == "hundred":
            group, found = (group or 1) * 100, True
        elif word in _THOUSANDS:
            total, group, found = total + (group or 1) * _THOUSANDS[word], 0, True
    return total + group if found else None


def surface_forms(answer: str) -> tuple[str, ...]:
    """Return the ways to write an answer at the start of a reply: in lower case, capitalised, as it is; a number in figures too."""
    forms = [answer, answer.lower(), answer.capitalize()]
    number = numeral_of(answer)
    if number is not None and (answer.isdecimal() or answer.lower() in _VALUES):
        words = [word for word, value in _VALUES.items() if value == number]
        forms += [str(number), *words, *(word.capitalize() for word in words)]
    return tuple(dict.fromkeys(forms))
