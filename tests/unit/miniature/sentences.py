"""A random writer of sentences of the small EBNF subset that `caption_grammar` uses."""

import random
import re
from typing import Any

_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([A-Za-z_][A-Za-z_0-9]*)|([()|?])')


class Sentences:
    """Parses a grammar once and writes random sentences of its rule `caption`."""

    def __init__(self, grammar: str) -> None:
        self.rules = {}
        for line in grammar.strip().splitlines():
            name, body = line.split("::=", 1)
            tokens = [match.groups() for match in _TOKEN.finditer(body)]
            self.rules[name.strip()], rest = self._choice(tokens)
            assert not rest, line

    def write(self, rng: random.Random) -> str:
        return self._expand(("rule", "caption"), rng)

    def _choice(self, tokens: Any) -> Any:
        options, (sequence, tokens) = [], self._sequence(tokens)
        options.append(sequence)
        while tokens and tokens[0][2] == "|":
            sequence, tokens = self._sequence(tokens[1:])
            options.append(sequence)
        return ("choice", options), tokens

    def _sequence(self, tokens: Any) -> Any:
        items = []
        while tokens and tokens[0][2] not in ("|", ")"):
            (literal, rule, mark), tokens = tokens[0], tokens[1:]
            if mark == "(":
                item, tokens = self._choice(tokens)
                assert tokens[0][2] == ")"
                tokens = tokens[1:]
            else:
                item = ("rule", rule) if rule else ("text", literal)
            if tokens and tokens[0][2] == "?":
                item, tokens = ("maybe", item), tokens[1:]
            items.append(item)
        return ("sequence", items), tokens

    def _expand(self, node: Any, rng: random.Random) -> str:
        kind, value = node
        if kind == "text":
            return value
        if kind == "rule":
            return self._expand(self.rules[value], rng)
        if kind == "choice":
            return self._expand(rng.choice(value), rng)
        if kind == "maybe":
            return self._expand(value, rng) if rng.random() < 0.5 else ""
        return "".join(self._expand(item, rng) for item in value)
