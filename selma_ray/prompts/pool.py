"""Deciding candidates, in one fixed order whatever the order of the answers.

Requests are decided in rounds: request 0 of every skill in the recipe's order, then request 1 of every skill that is not
full, and so on. Early answers wait. The examples of request r are drawn from what its skill had kept up to request r - W,
so W requests of a skill may be in flight, and what is kept depends on the answers, the recipe and the seed, never on timing.
"""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from selma_ray.errors import PromptYieldError
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.prompts.parsing import ListItem, parse_numbered_list
from selma_ray.prompts.requests import PromptRequest
from selma_ray.prompts.splits import split_of
from selma_ray.prompts.store import PromptCandidate, decided_requests, forget_from, prompt_rows, write_decided
from selma_ray.records import seed_of
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder
from selma_ray.words import count_words, normal_form

__all__ = ["PromptPool", "WrittenAnswer"]


@dataclass(frozen=True)
class WrittenAnswer:
    """What the LLM answered to one request; `truncated` says that it ran into its token limit."""

    skill: str
    number: int
    text: str
    truncated: bool = False


@dataclass
class _SkillState:
    skill: Skill
    diversity: DiversityFilter
    kept_after: list[int]  # kept prompts after each decided request; the first entry is before any
    kept: list[str] = field(default_factory=list)
    issued: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def decided(self) -> int:
        return len(self.kept_after) - 1


class PromptPool:
    """The kept prompts of all skills of a run; goes on from the decisions that the run's folder holds."""

    def __init__(
        self,
        skills: Sequence[Skill],
        config: PromptsConfig,
        seed: int,
        folder: RunFolder,
        excluded: Collection[str] = (),
    ) -> None:
        self._config = config
        self._seed = seed
        self._folder = folder
        self._states = {
            skill.name: _SkillState(skill, DiversityFilter(config.rouge_l_threshold), [0]) for skill in skills
        }
        self._excluded = {normal_form(prompt) for prompt in excluded}
        self._seen: set[str] = set()
        self._waiting: dict[tuple[str, int], WrittenAnswer] = {}
        for state in self._states.values():
            for prompt in state.skill.seeds:
                state.diversity.add(prompt)
                self._seen.add(normal_form(prompt))
        self._replay()

    @property
    def complete(self) -> bool:
        """Tell whether every skill has kept all its prompts."""
        return self._turn() is None

    @property
    def missing(self) -> int:
        """Return how many prompts are still to be kept."""
        return self._config.per_skill * len(self._states) - self.kept

    @property
    def kept(self) -> int:
        """Return how many prompts are kept."""
        return sum(len(state.kept) for state in self._states.values())

    @property
    def decided(self) -> dict[str, int]:
        """Return how many requests of each skill are decided."""
        return {skill: state.decided for skill, state in self._states.items()}

    @property
    def rejected(self) -> Counter[str]:
        """Return how many candidates were rejected, by reason."""
        return sum((state.rejected for state in self._states.values()), Counter())

    @property
    def unanswered(self) -> int:
        """Return how many requests of skills that are not full were issued and not answered."""
        return sum(
            (state.skill.name, number) not in self._waiting
            for state in self._unfinished()
            for number in range(state.decided, state.issued)
        )

    def open_requests(self, limit: int) -> list[PromptRequest]:
        """Return at most `limit` requests that may be issued now, without issuing them."""
        window, bound = self._config.requests_in_flight, self._config.max_requests
        numbers = [
            (number, state)
            for state in self._unfinished()
            for number in range(state.issued, min(state.decided + window, bound))
        ]
        numbers.sort(key=lambda entry: entry[0])
        return [self._request(state, number) for number, state in numbers[:limit]]

    def issue(self, requests: Sequence[PromptRequest]) -> None:
        """Mark requests that `open_requests` gave as issued."""
        for request in requests:
            self._states[request.skill].issued = request.number + 1

    def hand_in(self, answer: WrittenAnswer) -> list[dict[str, Any]]:
        """Take an answer; returns the prompts (rows of PROMPT_SCHEMA) that it and earlier answers let be kept.

        Raises:
            PromptYieldError: when a skill has used up its requests.
            StorageError: when the decision cannot be written.
        """
        self._waiting[answer.skill, answer.number] = answer
        rows: list[dict[str, Any]] = []
        while (state := self._turn()) is not None:
            next_answer = self._waiting.pop((state.skill.name, state.decided), None)
            if next_answer is None:
                break
            candidates = self._decide(state, next_answer)
            write_decided(self._folder, state.skill.name, next_answer.number, candidates)
            self._close(state, candidates)
            rows += prompt_rows(state.skill.name, candidates)
            self._check_yield(state)
        return rows

    def _unfinished(self) -> list[_SkillState]:
        return [state for state in self._states.values() if len(state.kept) < self._config.per_skill]

    def _turn(self) -> _SkillState | None:
        """Return the skill whose next request is decided next; None when all are full."""
        return min(self._unfinished(), key=lambda state: state.decided, default=None)

    def _replay(self) -> None:
        decided = {skill: decided_requests(self._folder, skill) for skill in self._states}
        while (state := self._turn()) is not None:
            self._check_yield(state)
            number, candidates = next(decided[state.skill.name], (None, []))
            if number != state.decided:
                break
            for candidate in candidates:
                if candidate.kept:
                    self._keep(state, candidate.text)
            self._close(state, candidates)
        for state in self._states.values():
            state.issued = state.decided
            # What stands behind a lost decision was decided in its light: it is decided anew.
            forget_from(self._folder, state.skill.name, state.decided)

    def _request(self, state: _SkillState, number: int) -> PromptRequest:
        seed = seed_of(self._seed, skill=state.skill.name, request=number)
        visible = state.kept_after[max(0, number + 1 - self._config.requests_in_flight)]
        seeds = state.skill.seeds
        size = len(seeds) + visible
        places = random.Random(seed).sample(range(size), min(self._config.examples_per_request, size))
        examples = tuple(seeds[place] if place < len(seeds) else state.kept[place - len(seeds)] for place in places)
        return PromptRequest(state.skill.name, number, seed, examples)

    def _decide(self, state: _SkillState, answer: WrittenAnswer) -> list[PromptCandidate]:
        items = parse_numbered_list(answer.text)
        candidates = []
        for position, item in enumerate(items):
            candidate = self._judge(state, item, cut_off=answer.truncated and position == len(items) - 1)
            if candidate.kept:
                self._keep(state, candidate.text)
            candidates.append(candidate)
        return candidates

    def _judge(self, state: _SkillState, item: ListItem, cut_off: bool) -> PromptCandidate:
        index = len(state.kept)
        if not item.parsed:
            return PromptCandidate(item.text, "unparsed")
        if cut_off:
            return PromptCandidate(item.text, "cut off")
        if index >= self._config.per_skill:
            return PromptCandidate(item.text, "surplus")
        if count_words(item.text) > state.skill.max_words:
            return PromptCandidate(item.text, "too long")
        normal = normal_form(item.text)
        if normal in self._excluded:
            return PromptCandidate(item.text, "held out")
        if normal in self._seen:
            return PromptCandidate(item.text, "duplicate")
        match = state.diversity.match(item.text)
        if match:
            return PromptCandidate(item.text, "too similar", nearest=match.prompt, score=match.score)
        return PromptCandidate(item.text, index=index, split=split_of(index, self._config))

    def _keep(self, state: _SkillState, prompt: str) -> None:
        state.kept.append(prompt)
        state.diversity.add(prompt)
        self._seen.add(normal_form(prompt))

    def _close(self, state: _SkillState, candidates: Sequence[PromptCandidate]) -> None:
        state.kept_after.append(len(state.kept))
        state.rejected.update(candidate.reason for candidate in candidates if candidate.reason)

    def _check_yield(self, state: _SkillState) -> None:
        config = self._config
        if len(state.kept) >= config.per_skill or state.decided < config.max_requests:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in state.rejected.most_common()) or "no candidates"
        others = "".join(
            f"; {other.skill.name} {len(other.kept)} of {config.per_skill} in {other.decided}"
            for other in self._states.values()
            if other is not state
        )
        raise PromptYieldError(
            f"skill {state.skill.name} kept {len(state.kept)} of {config.per_skill} prompts in prompts.max_requests="
            f"{config.max_requests} requests ({_share(state)} of its candidates; rejected: {reasons}{others}); "
            "raise max_requests, lower per_skill, or widen the skill's rules"
        )


def _share(state: _SkillState) -> str:
    candidates = len(state.kept) + state.rejected.total()
    return f"{len(state.kept) / candidates:.1%}" if candidates else "none"
