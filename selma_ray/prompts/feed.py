"""The prompt pool as an actor, which the stream asks for requests until it is full."""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from selma_ray.cluster.metrics import count
from selma_ray.errors import SelmaError
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.pool import PromptPool, WrittenAnswer
from selma_ray.prompts.progress import PromptProgress, write_prompt_progress
from selma_ray.prompts.requests import PromptRequest, request_text
from selma_ray.prompts.store import prompt_rows, read_decided
from selma_ray.records import PROMPT_SCHEMA
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder

__all__ = ["REQUEST_SCHEMA", "DecideAnswers", "PromptFeed"]

_WRITE_EVERY_S = 3.0

REQUEST_SCHEMA = pa.schema(
    [
        ("skill", pa.string()),
        ("request", pa.int64()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("first_number", pa.int64()),  # number of the list's item that the text ends in
    ]
)


class PromptFeed:
    """Hands out requests and takes answers; every call may be repeated, as Ray repeats the tasks of a lost worker."""

    def __init__(
        self,
        skills: Sequence[Skill],
        config: PromptsConfig,
        seed: int,
        folder: RunFolder,
        excluded: Collection[str],
        block_size: int,
    ) -> None:
        self._skills = {skill.name: skill for skill in skills}
        self._config = config
        self._open_pool = partial(PromptPool, skills, config, seed, folder, excluded)
        self._block_size = block_size
        self._blocks: list[list[PromptRequest]] = []
        self._decided_by_answer: dict[tuple[str, int], list[tuple[str, int]]] = {}
        self._failure: SelmaError | None = None
        self._folder = folder
        self._progress: PromptProgress | None = None
        self._changed = asyncio.Condition()

    async def open(self) -> int:
        """Read what the run's folder holds; returns how many prompts are still to be kept. Called once, first.

        Not part of the constructor: Ray hands on what a call raises, and only the text of what a constructor raises.
        """
        self._pool = self._open_pool()
        return self._pool.missing

    async def ask(self, position: int) -> list[dict[str, Any]]:
        """Return block `position` of requests (rows of REQUEST_SCHEMA), empty when no more are needed.

        Waits until a whole block may be issued, or until no answer is outstanding that could add to it. So a stage that
        batches whole blocks never holds back a request that the next answer depends on.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: position < len(self._blocks) or self._next_block() is not None)
            if position == len(self._blocks):
                block = self._next_block() or []
                self._pool.issue(block)
                self._blocks.append(block)
            return [self._row(request) for request in self._blocks[position]]

    async def hand_in(self, answers: Sequence[WrittenAnswer]) -> list[dict[str, Any]]:
        """Take answers; returns the prompts (rows of PROMPT_SCHEMA) that they let be kept."""
        rows = []
        async with self._changed:
            for answer in answers:
                known = self._decided_by_answer.get((answer.skill, answer.number))
                rows += self._take(answer) if known is None else self._kept_of(known)
            self._changed.notify_all()
        return rows

    def _kept_of(self, decided: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Return the prompts that requests let be kept, as the run's folder has them: in memory they would be all of the run's."""
        return [
            row
            for skill, number in decided
            for row in prompt_rows(skill, read_decided(self._folder, skill, number) or ())
        ]

    def _take(self, answer: WrittenAnswer) -> list[dict[str, Any]]:
        try:
            rejected, decided = Counter(self._pool.rejected), self._pool.decided
            kept = self._pool.hand_in(answer)
            # In the order in which they were decided: by rounds, in the recipe's order of skills.
            self._decided_by_answer[answer.skill, answer.number] = sorted(
                ((skill, number) for skill, end in self._pool.decided.items() for number in range(decided[skill], end)),
                key=lambda entry: entry[1],
            )
            self._count(len(kept), self._pool.rejected - rejected)
            self._record_progress(len(kept))
            return kept
        except SelmaError as error:
            self._failure = error
            self._changed.notify_all()
            raise

    def _count(self, kept: int, rejected: Counter[str]) -> None:
        """Count prompts for whoever watches the cluster."""
        count("selma_prompts_kept", kept, self._folder.uri, "generate")
        for reason, number in rejected.items():
            count("selma_prompts_rejected", number, self._folder.uri, "generate", reason=reason)

    def _record_progress(self, newly_kept: int) -> None:
        """Write how far the prompts are, now and then and at the end."""
        pool, before, now = self._pool, self._progress, time.time()
        if before and (pool.kept == before.kept or now - before.updated_at < _WRITE_EVERY_S) and pool.missing:
            return
        self._progress = PromptProgress(
            wanted=pool.kept + pool.missing,
            kept=pool.kept,
            found=before.found if before else pool.kept - newly_kept,
            reasons=dict(pool.rejected.most_common()),
            first_answer_at=before.first_answer_at if before else now,
            updated_at=now,
        )
        write_prompt_progress(self._folder, self._progress)

    def _next_block(self) -> list[PromptRequest] | None:
        """Return the next block, an empty one at the end, or None while answers must come first."""
        if self._failure:
            raise self._failure
        requests = self._pool.open_requests(self._block_size)
        if self._pool.complete or len(requests) == self._block_size or self._pool.unanswered == 0:
            return requests
        return None

    def _row(self, request: PromptRequest) -> dict[str, Any]:
        text = request_text(self._skills[request.skill], request.examples, self._config.per_request)
        return {
            "skill": request.skill,
            "request": request.number,
            "seed": request.seed,
            "text": text,
            "first_number": len(request.examples) + 1,
        }


class DecideAnswers:
    """Hands answers to the feed and passes on the prompts that they let be kept."""

    def __init__(self, feed: ray.actor.ActorHandle) -> None:
        self._feed = feed

    def __call__(self, answers: pa.Table) -> pa.Table:
        """Take rows (skill, request, answer, truncated); returns rows of PROMPT_SCHEMA."""
        handed_in = [
            WrittenAnswer(row["skill"], row["request"], row["answer"], row["truncated"]) for row in answers.to_pylist()
        ]
        return pa.Table.from_pylist(ray.get(self._feed.hand_in.remote(handed_in)), schema=PROMPT_SCHEMA)
