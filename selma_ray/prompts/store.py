"""The decided requests of a run: every candidate of every answer, kept or why not, in order.

prompts/<skill>/request-000123.json    one decided request
prompts/<skill>/requests-000000.json   a thousand of them, put together when the last is decided
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from selma_ray.errors import StorageError
from selma_ray.records import PROMPT_SCHEMA, Split, content_id
from selma_ray.storage import READERS, RunFolder

__all__ = [
    "PromptCandidate",
    "decided_requests",
    "forget_from",
    "prompt_rows",
    "prompt_summary",
    "read_decided",
    "read_prompts",
    "write_decided",
]

REQUESTS_PER_FILE = 1000


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
    """Record the decisions on one answer, atomically; those on a thousand are put together when the last of them is made."""
    folder.write_json(_record(skill, number, candidates), *_path(skill, number))
    if (number + 1) % REQUESTS_PER_FILE == 0:
        _put_together(folder, skill, number + 1 - REQUESTS_PER_FILE)


def read_decided(folder: RunFolder, skill: str, number: int) -> list[PromptCandidate] | None:
    """Return the decisions on one answer, or None where it is not decided yet."""
    path = _path(skill, number)
    if folder.exists(*path):
        return _candidates(folder.read_json(*path))
    together = _path_of_many(skill, number - number % REQUESTS_PER_FILE)
    if not folder.exists(*together):
        return None
    return next((made for each, made in _read_many(folder, "/".join(together)) if each == number), None)


def decided_requests(folder: RunFolder, skill: str) -> Iterator[tuple[int, list[PromptCandidate]]]:
    """Yield the numbers of a skill's decided requests with the decisions, in order; reads some ahead, and holds a thousand at most."""
    for first, paths in sorted(_by_thousand(folder, skill).items()):
        # After a kill a request may stand in both kinds of file, with the same decisions.
        yield from sorted(dict(entry for many in _read_thousand(folder, skill, first, paths) for entry in many).items())


def forget_from(folder: RunFolder, skill: str, number: int) -> None:
    """Delete the decisions on a skill's answers from `number` on."""
    thousands = _by_thousand(folder, skill)
    first = number - number % REQUESTS_PER_FILE
    folder.delete_files([path for each, paths in thousands.items() if each > first for path in paths])
    for path, entries in zip(thousands.get(first, ()), _read_each(folder, thousands.get(first, ())), strict=True):
        before = [(each, made) for each, made in entries if each < number]
        if not before:
            folder.delete(path)
        elif len(before) < len(entries):
            _write_many(folder, skill, first, before)


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
    rows = [row for _, candidates in decided_requests(folder, skill) for row in prompt_rows(skill, candidates)]
    rows.sort(key=lambda row: row["index"])
    return pa.Table.from_pylist([row for row in rows if split in (None, row["split"])], schema=PROMPT_SCHEMA)


def prompt_summary(folder: RunFolder, skills: Sequence[str]) -> dict[str, Any]:
    """Return how many prompts were kept and rejected, with reasons, and the requests asked; in all and by skill."""
    by_skill = {skill: _skill_summary(folder, skill) for skill in skills}
    reasons = sum((Counter(summary["reasons"]) for summary in by_skill.values()), Counter())
    totals = {key: sum(summary[key] for summary in by_skill.values()) for key in ("kept", "rejected", "requests")}
    return {**totals, "reasons": dict(reasons.most_common()), "skills": by_skill}


def _skill_summary(folder: RunFolder, skill: str) -> dict[str, Any]:
    reasons = Counter[str]()
    kept = requests = 0
    for _, candidates in decided_requests(folder, skill):
        reasons.update(candidate.reason for candidate in candidates if candidate.reason)
        kept += sum(candidate.kept for candidate in candidates)
        requests += 1
    return {
        "kept": kept,
        "rejected": reasons.total(),
        "requests": requests,
        "reasons": dict(reasons.most_common()),
    }


def _put_together(folder: RunFolder, skill: str, first: int) -> None:
    """Write a thousand requests as one file; the files of each go when it is written."""
    paths = _by_thousand(folder, skill)[first]
    _write_many(folder, skill, first, sorted(entry for many in _read_each(folder, paths) for entry in many))
    folder.delete_files([path for path in paths if path != "/".join(_path_of_many(skill, first))])


def _by_thousand(folder: RunFolder, skill: str) -> dict[int, list[str]]:
    """Return the paths of a skill's files of decided requests, by the first number of their thousand."""
    paths: dict[int, list[str]] = {}
    for path in folder.files("prompts", skill, suffix=".json"):
        number = int(path.removesuffix(".json").rpartition("-")[2])
        paths.setdefault(number - number % REQUESTS_PER_FILE, []).append(path)
    return paths


def _read_thousand(
    folder: RunFolder, skill: str, first: int, paths: Sequence[str]
) -> list[list[tuple[int, list[PromptCandidate]]]]:
    """Read the files of a thousand; lists them anew where they were put together between listing and reading."""
    while True:
        try:
            return _read_each(folder, paths)
        except StorageError:
            listed = _by_thousand(folder, skill).get(first, [])
            if set(paths) <= set(listed):
                raise
            paths = listed


def _read_each(folder: RunFolder, paths: Sequence[str]) -> list[list[tuple[int, list[PromptCandidate]]]]:
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda path: _read_many(folder, path), paths))


def _read_many(folder: RunFolder, path: str) -> list[tuple[int, list[PromptCandidate]]]:
    content = folder.read_json(path)
    records = content if isinstance(content, list) else [content]
    return [(record["request"], _candidates(record)) for record in records]


def _write_many(
    folder: RunFolder, skill: str, first: int, decided: Sequence[tuple[int, Sequence[PromptCandidate]]]
) -> None:
    records = [_record(skill, number, candidates) for number, candidates in decided]
    folder.write_bytes(json.dumps(records, ensure_ascii=False).encode(), *_path_of_many(skill, first))


def _record(skill: str, number: int, candidates: Sequence[PromptCandidate]) -> dict[str, Any]:
    content = [{key: value for key, value in vars(candidate).items() if value is not None} for candidate in candidates]
    return {"skill": skill, "request": number, "candidates": content}


def _candidates(record: dict[str, Any]) -> list[PromptCandidate]:
    return [PromptCandidate(**candidate) for candidate in record["candidates"]]


def _path(skill: str, number: int) -> tuple[str, str, str]:
    return "prompts", skill, f"request-{number:06d}.json"


def _path_of_many(skill: str, first: int) -> tuple[str, str, str]:
    return "prompts", skill, f"requests-{first:06d}.json"
