"""Words of any script: ROUGE-L's tokens, how many words a text has, and what copies of a text share."""

import re
import unicodedata

import regex

__all__ = ["count_words", "has_letter_or_digit", "normal_form", "tokens_of"]

# Written without spaces between words. A character of the first says about as much as a word of others; of the second about a third.
_CJK = r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Bopomofo}ー"
_SOUTH_EAST_ASIAN = r"\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}"
_CLUSTERS_PER_WORD = 3
_UNSPACED = _CJK + _SOUTH_EAST_ASIAN
_OTHER_LETTER = r"[\p{L}\p{Nd}]--[\p{Script=Latin}0-9]"


def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, flags=regex.VERSION1)


_PUBLISHED = re.compile(r"[a-z0-9]+")
_OTHER = _compiled(rf"[{_OTHER_LETTER}]")
_TOKEN = _compiled(
    rf"[a-z0-9]+|[{_UNSPACED}]\p{{M}}*|[[{_OTHER_LETTER}]--[{_UNSPACED}]][[[{_OTHER_LETTER}]\p{{M}}]--[{_UNSPACED}]]*"
)
_WORD = _compiled(rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")
_CJK_CLUSTER = _compiled(rf"[{_CJK}]\p{{M}}*")
_SOUTH_EAST_ASIAN_CLUSTER = _compiled(rf"[{_SOUTH_EAST_ASIAN}--\p{{M}}]\p{{M}}*")
_INVISIBLE = _compiled(r"\p{Cf}")
_SPACE = _compiled(r"[\s\u200b]+")


def tokens_of(text: str) -> list[str]:
    """Return the tokens by which ROUGE-L compares a text.

    Latin letters and digits are split exactly as by rouge-score: lower case, runs of a-z and 0-9. Of other scripts, which it would
    not see, a token is a word, or a character of those that put no spaces between words.
    """
    if text.isascii() or not _OTHER.search(text):
        return _PUBLISHED.findall(text.lower())
    return _TOKEN.findall(_INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).lower())


def count_words(text: str) -> int:
    """Return how many words a text has: runs without white space, and the characters of Chinese and Japanese one by one.

    Of Thai, Lao, Khmer and Burmese, whose words only a dictionary tells apart, three characters count as one.
    """
    return sum(_words_of_run(run) for run in _SPACE.split(text) if run)


def has_letter_or_digit(text: str) -> bool:
    """Tell whether a text says anything: whether it has a letter or digit, of any script."""
    return any(character.isalnum() for character in text)


def normal_form(text: str) -> str:
    """Return what copies of a text share, whatever their case, white space, punctuation, width and invisible characters."""
    if text.isascii():
        return " ".join(_PUBLISHED.findall(text.lower())) or " ".join(text.split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = _INVISIBLE.sub("", folded)
    return " ".join(_WORD.findall(visible)) or " ".join(visible.split())


def _words_of_run(run: str) -> int:
    if run.isascii():
        return 1
    rest, num_cjk = _CJK_CLUSTER.subn("", run)
    rest, num_clusters = _SOUTH_EAST_ASIAN_CLUSTER.subn("", rest)
    counted = num_cjk + -(-num_clusters // _CLUSTERS_PER_WORD)
    return counted + 1 if not counted or has_letter_or_digit(rest) else counted
