import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.prompts.free import invent_caption
from selma_ray.words import tokens_of

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
# Few words, so that prompts overlap; some that the tokenizer splits, drops or lowers.
WORDS = st.sampled_from(["a", "A", "red", "cat", "sits", "on", "two", "mat", "t-shirt", "it's", "3", "écru", "—"])
PROMPTS = st.lists(WORDS, max_size=14).map(" ".join)


def published_rule(candidates: list[str], threshold: float) -> list[bool]:
    """Tell which candidates the published rule keeps, scoring every pair with the rouge-score package."""
    kept: list[str] = []
    flags = []
    for candidate in candidates:
        scores = [SCORER.score(prompt, candidate)["rougeL"].fmeasure for prompt in kept]
        flags.append(max(scores, default=0.0) <= threshold)
        if flags[-1]:
            kept.append(candidate)
    return flags


def filter_flags(candidates: list[str], threshold: float) -> list[bool]:
    diversity = DiversityFilter(threshold)
    flags = []
    for candidate in candidates:
        flags.append(diversity.match(candidate) is None)
        if flags[-1]:
            diversity.add(candidate)
    return flags


LATIN = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["Cc", "Cs"], exclude_characters="µ"), max_size=40
)


@given(LATIN, LATIN)
def test_score_is_that_of_rouge_score_to_the_last_bit(first: str, second: str) -> None:
    diversity = DiversityFilter(0.01)  # below every score of texts so short that share a token
    diversity.add(first)
    match = diversity.match(second)
    assert (match.score if match else 0.0) == SCORER.score(first, second)["rougeL"].fmeasure


@settings(max_examples=300, deadline=None)
@given(st.lists(PROMPTS, max_size=25), st.sampled_from([0.2, 0.5, 2 / 3, 0.8, 0.95, 1.0]))
def test_filter_keeps_what_the_published_rule_keeps(candidates: Any, threshold: Any) -> None:
    assert filter_flags(candidates, threshold) == published_rule(candidates, threshold)


def test_filter_reproduces_the_reference_codes_decisions(shared_eval: Path) -> None:
    oracle = json.loads((shared_eval / "oracles" / "rouge_l_filter.json").read_text())["filter"]
    lines = (shared_eval / "prompts" / "t2i-compbench" / "color.txt").read_text().splitlines()
    diversity = DiversityFilter(0.8)
    for seed in lines[:3]:
        diversity.add(seed)
    flags = []
    for candidate in lines[3:1000]:
        flags.append(int(diversity.match(candidate) is None))
        if flags[-1]:
            diversity.add(candidate)
    assert flags == oracle["keep_flags"]
    assert sum(flags) == oracle["kept"]


def test_filter_agrees_with_rouge_score_on_parti_prompts(shared_eval: Path) -> None:
    lines = (shared_eval / "prompts" / "parti" / "PartiPrompts.tsv").read_text().splitlines()[1:]
    prompts = [line.split("\t")[0] for line in lines]
    kept = DiversityFilter(0.8)
    for prompt in prompts[:300]:
        kept.add(prompt)
    for candidate in [*prompts[250:280], *prompts[300:330]]:
        best = max(SCORER.score(prompt, candidate)["rougeL"].fmeasure for prompt in prompts[:300])
        assert (kept.match(candidate) is not None) == (best > 0.8)


def test_match_names_the_prompt_and_the_score() -> None:
    diversity = DiversityFilter(0.8)
    diversity.add("a house")
    diversity.add("a red cat sits on a mat")
    match = diversity.match("a red cat sat on a mat")
    assert match is not None
    assert match.prompt == "a red cat sits on a mat"
    assert match.score == pytest.approx(6 / 7)


def test_score_equal_to_the_threshold_passes() -> None:
    diversity = DiversityFilter(0.5)
    diversity.add("a b")
    assert SCORER.score("a b", "b c")["rougeL"].fmeasure == 0.5
    assert diversity.match("b c") is None


def test_prompts_without_tokens_match_nothing() -> None:
    diversity = DiversityFilter(0.8)
    diversity.add("—")
    assert tokens_of("—") == []
    assert diversity.match("—") is None


@pytest.mark.parametrize(
    ("kept", "candidate", "score"),
    [
        ("3 кота на столе", "3 собаки на траве", 0.5),
        ("три кота сидят на столе", "три кота стоят на столе", 0.8),
        ("一只猫坐在垫子上", "一只狗坐在垫子上", 7 / 8),
        ("一只猫坐在垫子上", "一只猫坐在垫子上。", 1.0),
        ("قطتان على السرير", "قطتان على الكرسي", 2 / 3),
    ],
)
def test_other_scripts_have_tokens_too(kept: str, candidate: str, score: float) -> None:
    diversity = DiversityFilter(score - 0.01)
    diversity.add(kept)
    match = diversity.match(candidate)
    assert match is not None
    assert match.prompt == kept
    assert match.score == pytest.approx(score)
    stricter = DiversityFilter(min(score + 0.01, 1.0))
    stricter.add(kept)
    assert stricter.match(candidate) is None


def test_filter_agrees_with_rouge_score_on_long_captions_with_common_words() -> None:
    rng = random.Random(0)
    kept = [invent_caption(rng) for _ in range(200)]
    diversity = DiversityFilter(0.8)
    for prompt in kept:
        diversity.add(prompt)
    flags = set()
    for number in range(30):
        words, others = rng.choice(kept).split(), invent_caption(rng).split()
        for place in rng.sample(range(len(words)), number % 5):
            words[place] = others[place]
        candidate = " ".join(words)
        best = max(SCORER.score(prompt, candidate)["rougeL"].fmeasure for prompt in kept)
        match = diversity.match(candidate)
        assert (match is not None) == (best > 0.8)
        flags.add(match is None)
    assert flags == {True, False}
