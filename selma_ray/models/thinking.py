"""What a reasoning model thinks aloud before it answers: told apart from the answer, and switched off where a template lets it."""

import re

__all__ = ["NO_THINKING", "split_thoughts"]

NO_THINKING = {"enable_thinking": False, "thinking": False, "reasoning": False, "thinking_budget": 0}
"""Arguments of chat templates that switch thinking off, as different models call them; a template does not see what it does not know."""

_KEY = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratch_?pad|analysis|monologue)"
_OPENING = re.compile(
    # <think>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|>, <|START_THINKING|> at the start of a line
    rf"^[ \t]*(?:(?:<\|?|\[|◁)(?!end)[\w:.-]*?{_KEY}[\w:.-]*(?:\|?>|\]|▷)"
    # the channels of gpt-oss and Gemma, and what is left of the first where special tokens are not shown
    r"|(?:<\|start\|>assistant)?<\|channel\|?>(?:analysis|commentary|thought)|(?-i:analysis(?=[A-Z])))",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSING = re.compile(
    rf"(?:<\|?|\[|◁)(?:/|end)[\w:.-]*?{_KEY}[\w:.-]*(?:\|?>|\]|▷)|<\|channel\|>final<\|message\|>|<channel\|>|assistantfinal",
    re.IGNORECASE,
)
_LIST_MARKER = re.compile(r"\s*(?:[*#>(\[]*\d{1,4}\W|[-*•–+]\s)")


def split_thoughts(answer: str) -> tuple[str, str]:
    """Return what a model thought, with its tags, and what it answered; a text without thoughts is all answer.

    Thoughts begin at a tag that opens a line and end at the next tag that closes them, or never. A closing tag alone ends thoughts
    whose opening one stands in the chat template; but one in an item of a list is a part of that item.
    """
    thoughts, said = [], []
    position = _end_of_unopened(answer)
    if position:
        thoughts.append(answer[:position])
    while opening := _OPENING.search(answer, position):
        said.append(answer[position : opening.start()])
        closing = _CLOSING.search(answer, opening.end())
        position = closing.end() if closing else len(answer)
        thoughts.append(answer[opening.start() : position])
    said.append(answer[position:])
    # What comes after thoughts begins a line of its own.
    return "\n".join(thoughts), ("\n" if thoughts else "") + "\n".join(said)


def _end_of_unopened(answer: str) -> int:
    """Return where thoughts end that begin with the answer, without a tag; 0 where there are none."""
    opening = _OPENING.search(answer)
    for closing in _CLOSING.finditer(answer, 0, opening.start() if opening else len(answer)):
        line = answer[answer.rfind("\n", 0, closing.start()) + 1 : closing.start()]
        if not _LIST_MARKER.match(line):
            return closing.end()
    return 0
