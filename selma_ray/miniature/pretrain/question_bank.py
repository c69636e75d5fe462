"""Every question the judge is trained on, and their answers for whole batches of scenes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from selma_ray.miniature.judge import ANSWERS
from selma_ray.miniature.pretrain.dataset import SceneArrays
from selma_ray.miniature.question_texts import every_question
from selma_ray.miniature.scenes import BACKGROUNDS, RELATIONS, STYLES
from selma_ray.miniature.sprites import COLOURS, OBJECTS

__all__ = ["CATEGORIES", "QuestionBank"]

CATEGORIES: tuple[str, ...] = ("whole", "color", "count", "spatial", "background", "style", "how_many")
_NO, _YES, _ZERO = ANSWERS.index("no"), ANSWERS.index("yes"), ANSWERS.index("0")
_RELATION_OF = {name: place for place, name in enumerate(RELATIONS)}


class QuestionBank:
    """All questions as texts, with the slots that each is about, addressed by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.slots: list[tuple[int, int]] = []
        self._numbers: dict[tuple[Any, ...], list[int]] = {}
        self._fill()

    def _add(self, key: tuple[Any, ...], *texts: str) -> None:
        self.slots.extend([_slots_of(key)] * len(texts))
        self._numbers[key] = list(range(len(self.texts), len(self.texts) + len(texts)))
        self.texts.extend(texts)

    def _fill(self) -> None:
        for key, texts in every_question():
            self._add(key, *texts)

    def draw(
        self, scenes: SceneArrays, rows: np.ndarray, size: int, rng: np.random.Generator, category: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `size` questions about each scene: their numbers [N, Q] and answers [N, Q].

        Yes and no are equally frequent in every category; questions to be denied are mostly near misses.
        """
        numbers = np.zeros((len(rows), size), np.int64)
        answers = np.zeros((len(rows), size), np.int64)
        for place, row in enumerate(rows):
            facts = _SceneFacts(scenes, int(row))
            for slot in range(size):
                kind = category or CATEGORIES[rng.choice(len(CATEGORIES), p=_SHARES)]
                truth = bool(rng.random() < 0.5)
                key, answer = _DRAWERS[kind](facts, truth, rng)
                options = self._numbers[key]
                numbers[place, slot] = options[rng.integers(len(options))]
                answers[place, slot] = answer
        return torch.from_numpy(numbers), torch.from_numpy(answers)


_SHARES = (0.2, 0.2, 0.2, 0.2, 0.06, 0.06, 0.08)


def _slots_of(key: tuple[Any, ...]) -> tuple[int, int]:
    """Return the two slots of the judge's image states that a question is about."""
    if key[0] == "background":
        return len(OBJECTS), len(OBJECTS)
    if key[0] == "style":
        return len(OBJECTS) + 1, len(OBJECTS) + 1
    return key[1], key[2] if key[0] == "spatial" else key[1]


class _SceneFacts:
    """One scene's facts as plain numbers."""

    def __init__(self, scenes: SceneArrays, row: int) -> None:
        self.counts = scenes.counts[row].tolist()
        self.colours = scenes.colours[row].tolist()
        self.background, self.style = scenes.settings[row].tolist()
        self.present = [o for o, count in enumerate(self.counts) if count]
        self.absent = [o for o, count in enumerate(self.counts) if not count]
        self.centres = {o: scenes.centres[row, o].tolist() for o in self.present}

    def relation(self, o: int, p: int) -> int:
        """Where o is, seen from p."""
        across = self.centres[o][0] - self.centres[p][0]
        down = self.centres[o][1] - self.centres[p][1]
        if abs(across) > abs(down):
            return _RELATION_OF["left_of"] if across < 0 else _RELATION_OF["right_of"]
        return _RELATION_OF["above"] if down < 0 else _RELATION_OF["below"]


_Drawn = tuple[tuple[Any, ...], int]


def _pick(options: list[int], rng: np.random.Generator) -> int:
    return options[rng.integers(len(options))]


def _other(count: int, but: int, rng: np.random.Generator) -> int:
    """Draw from range(count) without one value."""
    value = int(rng.integers(count - 1))
    return value + (value >= but)


def _draw_whole(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    return ("whole", _pick(facts.present if truth else facts.absent, rng)), _YES if truth else _NO


def _draw_colour(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    o = _pick(facts.present, rng)
    if truth:
        return ("color", o, facts.colours[o]), _YES
    if rng.random() < 0.2:  # an absent object, often in a colour that the scene shows
        return ("color", _pick(facts.absent, rng), facts.colours[o]), _NO
    seen = [facts.colours[p] for p in facts.present if facts.colours[p] != facts.colours[o]]
    colour = _pick(seen, rng) if seen and rng.random() < 0.4 else _other(len(COLOURS), facts.colours[o], rng)
    return ("color", o, colour), _NO


def _draw_count(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    o = _pick(facts.present, rng)
    count = facts.counts[o]
    if truth:
        return ("count", o, count), _YES
    if rng.random() < 0.15:
        return ("count", _pick(facts.absent, rng), int(rng.integers(1, 5))), _NO
    return ("count", o, 1 + _other(4, count - 1, rng)), _NO


def _draw_spatial(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    if len(facts.present) < 2:
        if truth:
            return _draw_whole(facts, truth, rng)
        o, p = _pick(facts.present, rng), _pick(facts.absent, rng)
        pair = (o, p) if rng.random() < 0.5 else (p, o)
        return ("spatial", *pair, int(rng.integers(len(RELATIONS)))), _NO
    o, p = rng.permutation(facts.present).tolist()
    relation = facts.relation(o, p)
    if truth:
        return ("spatial", o, p, relation), _YES
    if rng.random() < 0.15:
        return ("spatial", o, _pick(facts.absent, rng), relation), _NO
    return ("spatial", o, p, _other(len(RELATIONS), relation, rng)), _NO


def _draw_background(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    b = facts.background if truth else _other(len(BACKGROUNDS), facts.background, rng)
    return ("background", b), _YES if truth else _NO


def _draw_style(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    s = facts.style if truth else _other(len(STYLES), facts.style, rng)
    return ("style", s), _YES if truth else _NO


def _draw_how_many(facts: _SceneFacts, truth: bool, rng: np.random.Generator) -> _Drawn:
    o = _pick(facts.present if rng.random() < 0.8 else facts.absent, rng)
    return ("how_many", o), _ZERO + facts.counts[o]


_DRAWERS: dict[str, Callable[[_SceneFacts, bool, np.random.Generator], _Drawn]] = {
    "whole": _draw_whole,
    "color": _draw_colour,
    "count": _draw_count,
    "spatial": _draw_spatial,
    "background": _draw_background,
    "style": _draw_style,
    "how_many": _draw_how_many,
}
