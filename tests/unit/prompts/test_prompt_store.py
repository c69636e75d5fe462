"""Decided requests on disk: one by one, put together by the thousand, and what a kill in between leaves."""

import asyncio
import random
from pathlib import Path

import pytest

from selma_ray.prompts import store
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.feed import PromptFeed
from selma_ray.prompts.pool import PromptPool, WrittenAnswer
from selma_ray.prompts.store import (
    PromptCandidate,
    decided_requests,
    forget_from,
    prompt_summary,
    read_decided,
    read_prompts,
    write_decided,
)
from selma_ray.storage import RunFolder
from tests.unit.prompts.test_prompt_pool import CONFIG, make_skill, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Return a folder in which four requests make a file."""
    monkeypatch.setattr(store, "REQUESTS_PER_FILE", 4)
    return RunFolder(str(tmp_path))


def write(folder: RunFolder, count: int) -> None:
    for number in range(count):
        kept = PromptCandidate(f"prompt {number}", index=number, split="train")
        write_decided(folder, "one", number, [kept, PromptCandidate("too many words", "too long")])


def names(folder: RunFolder) -> list[str]:
    return [path.rpartition("/")[2] for path in folder.files("prompts")]


def test_requests_are_put_together_when_the_last_of_a_file_is_decided(folder: RunFolder) -> None:
    write(folder, 10)
    assert names(folder) == [
        "request-000008.json", "request-000009.json", "requests-000000.json", "requests-000004.json",
    ]  # fmt: skip
    assert [number for number, _ in decided_requests(folder, "one")] == list(range(10))
    for number in range(10):
        decided = read_decided(folder, "one", number)
        assert decided is not None
        kept, rejected = decided
        assert (kept.text, kept.index, kept.split) == (f"prompt {number}", number, "train")
        assert (rejected.text, rejected.reason) == ("too many words", "too long")
    assert read_decided(folder, "one", 10) is None
    assert read_prompts(folder, "one")["prompt"].to_pylist() == [f"prompt {number}" for number in range(10)]
    assert prompt_summary(folder, ["one"]) == {
        "kept": 10, "rejected": 10, "requests": 10, "reasons": {"too long": 10},
        "skills": {"one": {"kept": 10, "rejected": 10, "requests": 10, "reasons": {"too long": 10}}},
    }  # fmt: skip


def test_a_request_that_a_kill_left_in_both_kinds_of_file_counts_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "delete_files", lambda self, paths: None)
    write(folder, 5)
    assert len(names(folder)) == 6
    assert prompt_summary(folder, ["one"])["requests"] == 5


@pytest.mark.parametrize("number", range(11))
def test_what_is_forgotten_is_gone_wherever_it_stands(folder: RunFolder, number: int) -> None:
    write(folder, 10)
    forget_from(folder, "one", number)
    assert [each for each, _ in decided_requests(folder, "one")] == list(range(min(number, 10)))
    write(folder, 10)
    assert [each for each, _ in decided_requests(folder, "one")] == list(range(10))


def test_requests_that_are_put_together_while_they_are_read_are_found(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, 3)
    files, stale = RunFolder.files, [folder.files("prompts")]
    write(folder, 4)
    monkeypatch.setattr(
        RunFolder, "files", lambda self, *parts, suffix="": stale.pop() if stale else files(self, *parts, suffix=suffix)
    )
    assert [number for number, _ in decided_requests(folder, "one")] == [0, 1, 2, 3]


@pytest.mark.parametrize("stop_after", [3, 8, 9, 17])
def test_a_stopped_pool_goes_on_from_files_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    skills = [make_skill("one"), make_skill("two")]
    alone, stopped = RunFolder(str(tmp_path / "alone")), RunFolder(str(tmp_path / "stopped"))
    run(PromptPool(skills, CONFIG, 0, alone), random.Random(0))
    monkeypatch.setattr(store, "REQUESTS_PER_FILE", 4)
    run(PromptPool(skills, CONFIG, 0, stopped), random.Random(1), max_answers=stop_after)
    run(PromptPool(skills, CONFIG, 0, stopped), random.Random(2))
    assert any(name.startswith("requests-") for name in names(stopped))
    for skill in ("one", "two"):
        assert read_prompts(stopped, skill) == read_prompts(alone, skill)


def test_a_repeated_call_reads_what_the_folder_holds(folder: RunFolder) -> None:
    feed = PromptFeed([make_skill("one"), make_skill("two")], CONFIG, 0, folder, (), block_size=4)
    asyncio.run(feed.open())
    requests = asyncio.run(feed.ask(0))
    # The first answers wait for those before them, and come with them.
    texts = (" a small boat at sea", " two hats on a chair", " seven green bottles", " old men who sing")
    answers = [
        WrittenAnswer(row["skill"], row["request"], text) for row, text in zip(reversed(requests), texts, strict=True)
    ]
    first = [asyncio.run(feed.hand_in([answer])) for answer in answers]
    assert [bool(rows) for rows in first] == [False] * (len(answers) - 1) + [True]
    assert [asyncio.run(feed.hand_in([answer])) for answer in answers] == first


def test_engines_share_the_requests_in_flight() -> None:
    def blocks(engines: int, in_flight: int = 16) -> int:
        config = PromptsConfig(requests_in_flight=in_flight, llm=LLMConfig(max_replicas=engines))
        return config.blocks_per_engine(num_skills=5)

    assert [blocks(engines) for engines in (1, 2, 4, 8, 20, 40)] == [20, 10, 5, 3, 1, 1]
    assert blocks(3, in_flight=1) == 2
