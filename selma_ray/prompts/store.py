"""The decided requests of a run, one object each: every candidate of every answer, kept or why not, in order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from selma_ray.records import PROMPT_SCHEMA, Split, content_id
from selma_ray.storage import RunFolder

__all__ = [
    "PromptCandidate",
    "forget_from",
    "prompt_rows",
    "prompt_summary",
    "read_decided",
    "read_prompts",
    "write_decided",
]


@dataclass(frozen=True)
class PromptCandidate:
    """One candidate of an answer.

    A kept one has an index (the order in which its skill kept it) and a split; a rejected one has a reason and, where
    another prompt is the reason, that prompt and the ROUGE-L F-measure to it.
    """

    text: str
    reason: str | None = None
    index: int | None = None
    split: Split | None = None
    nearest: str | None = None
    score: float | None = None

    @property
    def kept(self) -> bool:
        """Tell whether the candidate was kept."""
        return self.index is not None


def write_decided(folder: RunFolder, skill: str, number: int, candidates: Sequence[PromptCandidate]) -> None:
    """Record the decisions on one answer, atomically."""
    content = [{key: value for key, value in vars(candidate).items() if value is not None} for candidate in candidates]
    folder.write_json({"skill": skill, "request": number, "candidates": content}, *_path(skill, number))


def read_decided(folder: RunFolder, skill: str, number: int) -> list[PromptCandidate] | None:
    """Return the decisions on one answer, or None where it is not decided yet."""
    path = _path(skill, number)
    return _candidates(folder.read_json(*path)) if folder.exists(*path) else None


def forget_from(folder: RunFolder, skill: str, number: int) -> None:
    """Delete the decisions on a skill's answers from `number` on."""
    for path in folder.files("prompts", skill, suffix=".json"):
        if path >= "/".join(_path(skill, number)):
            folder.delete(path)


def prompt_rows(skill: str, candidates: Sequence[PromptCandidate]) -> list[dict[str, Any]]:
    """Return the kept candidates as rows of PROMPT_SCHEMA."""
    return [
        {
            "id": content_id(skill=skill, prompt=candidate.text),
            "skill": skill,
            "index": candidate.index,
            "prompt": candidate.text,
            "split": candidate.split,
        }
        for candidate in candidates
        if candidate.kept
    ]


def read_prompts(folder: RunFolder, skill: str, split: Split | None = None) -> pa.Table:
    """Return a skill's kept prompts in the order of their index, of one split or of all (PROMPT_SCHEMA)."""
    rows = [row for candidates in _all_decided(folder, skill) for row in prompt_rows(skill, candidates)]
    rows.sort(key=lambda row: row["index"])
    return pa.Table.from_pylist([row for row in rows if split in (None, row["split"])], schema=PROMPT_SCHEMA)


def prompt_summary(folder: RunFolder, skills: Sequence[str]) -> dict[str, Any]:
    """Return how many prompts were kept and rejected, with reasons, and the requests asked; in all and by skill."""
    by_skill = {skill: _skill_summary(folder, skill) for skill in skills}
    reasons = sum((Counter(summary["reasons"]) for summary in by_skill.values()), Counter())
    totals = {key: sum(summary[key] for summary in by_skill.values()) for key in ("kept", "rejected", "requests")}
    return {**totals, "reasons": dict(reasons.most_common()), "skills": by_skill}


def _skill_summary(folder: RunFolder, skill: str) -> dict[str, Any]:
    decided = _all_decided(folder, skill)
    candidates = [candidate for request in decided for candidate in request]
    reasons = Counter(candidate.reason for candidate in candidates if candidate.reason)
    kept = sum(candidate.kept for candidate in candidates)
    return {
        "kept": kept,
        "rejected": len(candidates) - kept,
        "requests": len(decided),
        "reasons": dict(reasons.most_common()),
    }


def _all_decided(folder: RunFolder, skill: str) -> list[list[PromptCandidate]]:
    return [_candidates(folder.read_json(path)) for path in folder.files("prompts", skill, suffix=".json")]


def _candidates(record: dict[str, Any]) -> list[PromptCandidate]:
    return [PromptCandidate(**candidate) for candidate in record["candidates"]]


def _path(skill: str, number: int) -> tuple[str, str, str]:
    return "prompts", skill, f"request-{number:06d}.json"
