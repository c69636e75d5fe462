import random
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selma_ray.errors import PromptYieldError, StorageError
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.pool import PromptPool, WrittenAnswer
from selma_ray.prompts.requests import PromptRequest
from selma_ray.prompts.splits import dev_count, split_of
from selma_ray.prompts.store import prompt_summary, read_decided, read_prompts
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder
from selma_ray.words import tokens_of

WORDS = (
    "red",
    "blue",
    "green",
    "apple",
    "car",
    "tree",
    "house",
    "under",
    "left",
    "of",
    "two",
    "cup",
    "fish",
    "boat",
    "hat",
    "moon",
)
SEEDS = ("a red apple", "two blue cups", "three cars under a tree")
CONFIG = PromptsConfig(per_skill=30, per_request=6, requests_in_flight=4, max_requests=60)


def make_skill(name: str) -> Skill:
    return Skill(name=name, description="things", max_words=9, seeds=SEEDS)


def answer_of(request: PromptRequest) -> WrittenAnswer:
    """WrittenAnswer as a language model would: what is said depends on the request's seed and examples."""
    rng = random.Random(f"{request.seed} {request.examples}")
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(3, 11))) for _ in range(6)]
    return WrittenAnswer(
        request.skill, request.number, "\n".join([f" {captions[0]}", *(f"5. {text}" for text in captions[1:])])
    )


def run(pool: PromptPool, rng: random.Random, max_answers: int | None = None, block_size: int = 1) -> list[dict]:
    """Drive a pool to its end, or for some answers; requests in flight are answered in random order."""
    in_flight: list[PromptRequest] = []
    rows = []
    answered = 0
    while not pool.complete and answered != max_answers:
        opened = pool.open_requests(block_size)
        pool.issue(opened)
        in_flight += opened
        assert in_flight, "nothing in flight and nothing to issue"
        request = in_flight.pop(rng.randrange(len(in_flight)))
        rows += pool.hand_in(answer_of(request))
        answered += 1
    return rows


def kept(folder: RunFolder, *skills: str) -> list[list[dict]]:
    return [read_prompts(folder, skill).to_pylist() for skill in skills]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.mark.parametrize("timing", range(5))
def test_outcome_does_not_depend_on_the_order_of_answers(tmp_path: Path, timing: Any) -> None:
    skills = [make_skill("one"), make_skill("two")]
    in_order, shuffled = RunFolder(str(tmp_path / "in-order")), RunFolder(str(tmp_path / "shuffled"))
    first_come = random.Random()
    first_come.randrange = lambda stop: 0  # type: ignore[assignment, method-assign, misc]
    run(PromptPool(skills, CONFIG, 0, in_order), first_come)
    run(PromptPool(skills, CONFIG, 0, shuffled), random.Random(timing), block_size=timing + 1)
    assert kept(shuffled, "one", "two") == kept(in_order, "one", "two")
    assert [len(rows) for rows in kept(in_order, "one", "two")] == [30, 30]


@pytest.mark.parametrize("stop_after", [1, 3, 7, 12])
def test_a_run_that_was_stopped_finishes_with_the_same_prompts(tmp_path: Path, stop_after: int) -> None:
    skills = [make_skill("one"), make_skill("two")]
    whole, stopped = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "stopped"))
    run(PromptPool(skills, CONFIG, 0, whole), random.Random(1))
    before = run(PromptPool(skills, CONFIG, 0, stopped), random.Random(2), max_answers=stop_after)
    assert [row for rows in kept(stopped, "one", "two") for row in rows] == sorted(
        before, key=lambda row: (row["skill"], row["index"])
    )
    after = run(PromptPool(skills, CONFIG, 0, stopped), random.Random(3))
    assert not {row["id"] for row in before} & {row["id"] for row in after}
    assert kept(stopped, "one", "two") == kept(whole, "one", "two")


def test_a_lost_decision_is_made_again_and_all_that_came_after_it(tmp_path: Path) -> None:
    skills = [make_skill("one"), make_skill("two")]
    whole, damaged = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "damaged"))
    run(PromptPool(skills, CONFIG, 0, whole), random.Random(1))
    run(PromptPool(skills, CONFIG, 0, damaged), random.Random(1))
    damaged.delete("prompts", "one", "request-000001.json")
    pool = PromptPool(skills, CONFIG, 0, damaged)
    assert len(damaged.files("prompts", "one")) == 1
    run(pool, random.Random(2))
    assert kept(damaged, "one", "two") == kept(whole, "one", "two")
    assert damaged.files() == whole.files()


def test_another_seed_asks_otherwise(tmp_path: Path) -> None:
    folders = [RunFolder(str(tmp_path / name)) for name in ("zero", "one")]
    for seed, folder in enumerate(folders):
        run(PromptPool([make_skill("one")], CONFIG, seed, folder), random.Random(0))
    assert kept(folders[0], "one") != kept(folders[1], "one")


def test_window_bounds_the_requests_in_flight(folder: RunFolder) -> None:
    pool = PromptPool([make_skill("one"), make_skill("two")], CONFIG, 0, folder)
    requests = pool.open_requests(100)
    assert [(request.number, request.skill) for request in requests] == [
        (n, s) for n in range(4) for s in ("one", "two")
    ]
    pool.issue(requests)
    assert pool.open_requests(100) == []
    assert pool.unanswered == 8
    pool.hand_in(answer_of(requests[2]))  # request 1 of skill one: decided only after request 0
    assert pool.open_requests(100) == []
    pool.hand_in(answer_of(requests[0]))
    assert [(request.number, request.skill) for request in pool.open_requests(100)] == [(4, "one")]


def test_examples_are_seeds_and_prompts_that_the_window_lets_see(folder: RunFolder) -> None:
    pool = PromptPool([make_skill("one")], CONFIG, 0, folder)
    run(pool, random.Random(0), max_answers=3)
    kept_texts = [row["prompt"] for row in kept(folder, "one")[0]]
    visible = {
        number: {*SEEDS, *(c.text for r in range(number - 3) for c in read_decided(folder, "one", r) or () if c.kept)}
        for number in range(8)
    }
    for request in pool.open_requests(10):
        assert len(request.examples) == 3
        assert set(request.examples) <= visible[request.number]
    assert kept_texts


def decide(folder: RunFolder, text: str, **options: Any) -> list[str]:
    """Return what was decided on each candidate of one answer."""
    pool = PromptPool([make_skill("one")], options.pop("config", CONFIG), 0, folder, options.pop("excluded", ()))
    pool.issue(pool.open_requests(1))
    pool.hand_in(WrittenAnswer("one", 0, text, **options))
    return [candidate.reason or "kept" for candidate in read_decided(folder, "one", 0) or ()]


def test_each_rejection_has_its_reason(folder: RunFolder) -> None:
    text = (
        " a boat\nHere are more:\n5. A boat!\n6. a red apple\n7. one two three four five six seven eight nine ten\n"
        "8. the two blue cups\n9. a moon over the sea"
    )
    decisions = decide(folder, text, excluded={"A moon, over the sea."})
    assert decisions == ["kept", "unparsed", "duplicate", "duplicate", "too long", "too similar", "held out"]
    similar = (read_decided(folder, "one", 0) or [])[5]
    assert similar.nearest == "two blue cups"
    assert similar.score == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("text", "decisions"),
    [
        (" 3 кота на столе\n5. 3 собаки на траве", ["kept", "kept"]),
        (" 一只猫坐在垫子上\n5、一只猫坐在垫子上。\n6、一只 猫坐在垫子上", ["kept", "duplicate", "duplicate"]),
        (" 一只猫坐在垫子上，旁边是一只狗", ["too long"]),
        (" a cafe\u0301\n5. a CAFÉ\n6. ａ\u200b ｃａｆé", ["kept", "duplicate", "duplicate"]),
        (" Три Кота\n5. три  кота!", ["kept", "duplicate"]),
        (" ---\n5. ...\n6. a boat", ["unparsed", "unparsed", "kept"]),
    ],
)
def test_prompts_of_every_script_are_decided_alike(folder: RunFolder, text: str, decisions: list[str]) -> None:
    assert decide(folder, text) == decisions


def test_a_caption_that_the_token_limit_cut_off_is_not_kept(folder: RunFolder) -> None:
    assert decide(folder, " a boat\n5. a moon over", truncated=True) == ["kept", "cut off"]


def test_candidates_beyond_the_number_asked_for_are_surplus(folder: RunFolder) -> None:
    config = CONFIG.model_copy(update={"per_skill": 1})
    assert decide(folder, " a boat\n5. a moon", config=config) == ["kept", "surplus"]


def test_exact_duplicates_do_not_pass_in_another_skill(folder: RunFolder) -> None:
    pool = PromptPool([make_skill("one"), make_skill("two")], CONFIG, 0, folder)
    pool.issue(pool.open_requests(2))
    pool.hand_in(WrittenAnswer("two", 0, " A  boat."))
    assert kept(folder, "two") == [[]]
    pool.hand_in(WrittenAnswer("one", 0, " a boat"))
    assert [row["prompt"] for row in kept(folder, "one")[0]] == ["a boat"]
    assert [c.reason for c in read_decided(folder, "two", 0) or ()] == ["duplicate"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_two_kept_prompts_of_any_skills_are_exact_duplicates(tmp_path: Path, data: st.DataObject) -> None:
    """Few words, so that most candidates repeat one of another request or skill; a restart stands in between."""
    folder = RunFolder(str(tmp_path / uuid.uuid4().hex))
    skills = [make_skill("one"), make_skill("two")]
    config = CONFIG.model_copy(update={"rouge_l_threshold": 1.0, "per_skill": 500})
    caption = st.lists(st.sampled_from(["a", "A", "red", "Red!", "cat", "cat.", "—"]), min_size=1, max_size=3).map(
        " ".join
    )
    for _ in range(2):
        pool = PromptPool(skills, config, 0, folder)
        requests = pool.open_requests(4)
        pool.issue(requests)
        for request in data.draw(st.permutations(requests)):
            captions = data.draw(st.lists(caption, min_size=1, max_size=5))
            pool.hand_in(WrittenAnswer(request.skill, request.number, "\n".join(f"4. {text}" for text in captions)))
    prompts = [row["prompt"] for rows in kept(folder, "one", "two") for row in rows]
    spoken = [" ".join(tokens_of(prompt)) or prompt for prompt in prompts]
    assert len(set(spoken)) == len(spoken)


def test_a_skill_that_cannot_reach_its_number_says_what_became_of_its_candidates(folder: RunFolder) -> None:
    skills = [make_skill("one"), make_skill("two")]
    pool = PromptPool(skills, CONFIG.model_copy(update={"max_requests": 2}), 0, folder)
    pool.issue(pool.open_requests(4))
    pool.hand_in(WrittenAnswer("one", 0, " a boat\n5. a boat"))
    pool.hand_in(WrittenAnswer("two", 0, " a moon over the sea"))
    with pytest.raises(
        PromptYieldError,
        match=r"one kept 1 of 30 .*max_requests=2 .*33.3% of its candidates; rejected: 2 duplicate; two 1 of 30 in 1\).*raise max_requests",
    ):
        pool.hand_in(WrittenAnswer("one", 1, " a boat"))


def test_summary_counts_every_candidate(folder: RunFolder) -> None:
    run(PromptPool([make_skill("one")], CONFIG, 0, folder), random.Random(0))
    summary = prompt_summary(folder, ["one"])
    assert summary["kept"] == 30
    assert summary["kept"] + summary["rejected"] == 6 * summary["requests"]
    assert sum(summary["reasons"].values()) == summary["rejected"]
    assert summary["skills"]["one"]["requests"] == summary["requests"]


def test_kept_prompts_are_numbered_and_split(folder: RunFolder) -> None:
    run(PromptPool([make_skill("one")], CONFIG, 0, folder), random.Random(0))
    rows = kept(folder, "one")[0]
    assert [row["index"] for row in rows] == list(range(30))
    assert len({row["id"] for row in rows}) == 30
    dev = read_prompts(folder, "one", "dev").to_pylist()
    assert len(dev) == dev_count(CONFIG) == 2
    assert [row for row in rows if row["split"] == "dev"] == dev


@pytest.mark.parametrize(
    ("per_skill", "fraction", "expected"), [(1000, 0.05, 50), (40, 0.05, 2), (5, 0.05, 1), (1, 0.05, 0), (40, 0.0, 0)]
)
def test_number_of_dev_prompts(per_skill: int, fraction: float, expected: int) -> None:
    config = PromptsConfig(per_skill=per_skill, dev_fraction=fraction)
    splits = [split_of(index, config) for index in range(per_skill)]
    assert dev_count(config) == splits.count("dev") == expected


def test_a_damaged_record_names_the_remedy(folder: RunFolder) -> None:
    run(PromptPool([make_skill("one")], CONFIG, 0, folder), random.Random(0), max_answers=2)
    folder.write_bytes(b"{", "prompts", "one", "request-000000.json")
    with pytest.raises(StorageError, match=r"request-000000\.json must be JSON .*delete it"):
        PromptPool([make_skill("one")], CONFIG, 0, folder)
