"""The feed without Ray: what it writes of its progress, and that repeated calls repeat their results."""

import asyncio
from pathlib import Path

import pytest

from selma_ray.prompts import feed as feeding
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.feed import PromptFeed
from selma_ray.prompts.pool import WrittenAnswer
from selma_ray.prompts.progress import read_prompt_progress, watch_prompts
from selma_ray.prompts.store import prompt_summary
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder

SKILLS = [Skill(name="one", description="things", max_words=6, seeds=("a red apple", "two cups"))]
CONFIG = PromptsConfig(per_skill=4, per_request=3, requests_in_flight=2, max_requests=9)
ANSWERS = [
    WrittenAnswer("one", 0, " a blue boat at sea\n4. two cups\n5. a green house with seven small windows on it"),
    WrittenAnswer("one", 1, " four brown horses run\n4. an old clock\n5. a blue boat on the sea"),
    WrittenAnswer("one", 2, " nine yellow umbrellas\n4. wet stones"),
]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def open_feed(folder: RunFolder) -> PromptFeed:
    feed = PromptFeed(SKILLS, CONFIG, 0, folder, (), block_size=1)
    asyncio.run(feed.open())
    return feed


def hand_in(feed: PromptFeed, *answers: WrittenAnswer) -> list[str]:
    return [row["prompt"] for row in asyncio.run(feed.hand_in(answers))]


def test_progress_is_written_as_prompts_are_decided(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_WRITE_EVERY_S", 0)
    feed, latest = open_feed(folder), watch_prompts(folder)
    assert hand_in(feed, ANSWERS[0]) == ["a blue boat at sea"]
    assert latest() == "prompts: 1 of 4 kept, 2 rejected (1 duplicate, 1 too long)"
    assert hand_in(feed, ANSWERS[1]) == ["four brown horses run", "an old clock", "a blue boat on the sea"]
    assert latest() == "prompts: 1 of 4 kept, 2 rejected (1 duplicate, 1 too long)", "it is read anew now and then"
    progress = read_prompt_progress(folder)
    assert (progress.kept, progress.wanted, progress.found) == (4, 4, 0)
    assert progress.reasons == prompt_summary(folder, ["one"])["reasons"]
    assert progress.prompts_per_s > 0


def test_the_end_is_written_however_soon_it_comes(folder: RunFolder) -> None:
    hand_in(open_feed(folder), *ANSWERS)
    assert read_prompt_progress(folder).kept == 4


def test_a_new_start_counts_what_it_found(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(open_feed(folder), ANSWERS[0])
    hand_in(open_feed(folder), ANSWERS[1])
    progress = read_prompt_progress(folder)
    assert (progress.found, progress.kept) == (1, 4)
    assert progress.reasons == {"duplicate": 1, "too long": 1}


def test_a_repeated_call_gets_the_same_prompts_and_decides_nothing_anew(folder: RunFolder) -> None:
    feed = open_feed(folder)
    requests = asyncio.run(feed.ask(0))
    assert asyncio.run(feed.ask(0)) == requests
    assert hand_in(feed, ANSWERS[0]) == hand_in(feed, ANSWERS[0]) == ["a blue boat at sea"]


def test_nothing_is_shown_before_there_is_progress(folder: RunFolder) -> None:
    assert watch_prompts(folder)() is None
