"""The diversity filter against scoring every pair with the rouge-score package, for 1,000 to 100,000 kept prompts on one core.

Run: python -m benchmarks.diversity

The captions are those of the stand-in language model; a fifth of the candidates are kept captions with some words replaced, on
both sides of the threshold. What rouge-score takes for all pairs is extrapolated from a sample of pairs. `exact` says that the
filter decided as rouge-score does: with 1,000 kept prompts on every pair, with more on the pairs of a candidate with the prompt
that it was made from and with the prompt that the filter named.
"""

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from benchmarks.common import machine, print_result, print_table
from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.prompts.free import invent_caption

KEPT = (1_000, 10_000, 100_000)
THRESHOLD = 0.8
_ROUNDS = 5
_CANDIDATES_PER_ROUND = 100
_PAIRS_PER_ROUND = 500
_CANDIDATES_CHECKED = 40


def main() -> None:
    """Measure filter and package alternately, then print a table and one JSON line."""
    print(machine())
    kept: list[str] = []
    diversity = DiversityFilter(THRESHOLD)
    rng = random.Random(0)
    rows, speedups, exact = [], {}, True
    for count in KEPT:
        while len(kept) < count:
            kept.append(invent_caption(rng))
            diversity.add(kept[-1])
        filter_s, pair_s = _measure(diversity, kept, rng)
        exact = exact and _decides_as_rouge_score(diversity, kept, rng)
        speedups[count] = pair_s * count / filter_s
        rows.append(
            [
                f"{count:,}",
                f"{1e3 * filter_s:.3f}",
                f"{1e3 * pair_s * count:,.0f}",
                f"{speedups[count]:,.0f}",
                f"{_memory_mb(count):.1f}",
            ]
        )
    header = ["kept prompts", "filter, ms a candidate", "rouge-score, ms a candidate", "times faster", "filter, MB"]
    print_table(header, rows)
    print_result({"speedup_at_100k": round(speedups[KEPT[-1]]), "exact": exact})


def _measure(diversity: DiversityFilter, kept: Sequence[str], rng: random.Random) -> tuple[float, float]:
    """Return the CPU seconds of one candidate in the filter and of one pair in rouge-score: medians of alternating rounds."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    filter_s, pair_s = [], []
    for _ in range(_ROUNDS):
        candidates = _candidates(kept, rng, _CANDIDATES_PER_ROUND)
        filter_s.append(_cpu_s(lambda: [diversity.match(text) for text in candidates]) / len(candidates))  # noqa: B023
        pairs = [(rng.choice(kept), rng.choice(candidates)) for _ in range(_PAIRS_PER_ROUND)]
        pair_s.append(_cpu_s(lambda: [scorer.score(*pair) for pair in pairs]) / len(pairs))  # noqa: B023
    return statistics.median(filter_s), statistics.median(pair_s)


def _decides_as_rouge_score(diversity: DiversityFilter, kept: Sequence[str], rng: random.Random) -> bool:
    """Tell whether the filter's decisions on some edited prompts are those of rouge-score."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(_CANDIDATES_CHECKED):
        origin = rng.choice(kept)
        candidate = _edited(origin, rng)
        match = diversity.match(candidate)
        compared = kept if len(kept) == KEPT[0] else [origin]
        best = max(scorer.score(prompt, candidate)["rougeL"].fmeasure for prompt in compared)
        if match is None and best > THRESHOLD:
            return False
        if match is not None:
            score = scorer.score(match.prompt, candidate)["rougeL"].fmeasure
            if score != match.score or score <= THRESHOLD:
                return False
    return True


def _candidates(kept: Sequence[str], rng: random.Random, count: int) -> list[str]:
    return [_edited(rng.choice(kept), rng) if rng.random() < 0.2 else invent_caption(rng) for _ in range(count)]


def _edited(caption: str, rng: random.Random) -> str:
    """Return a caption with up to five words replaced."""
    words, others = caption.split(), invent_caption(rng).split()
    for place in rng.sample(range(len(words)), rng.randint(0, 5)):
        words[place] = others[place]
    return " ".join(words)


def _memory_mb(count: int) -> float:
    """Return the memory of a filter that holds `count` prompts, the prompts included."""
    rng = random.Random(0)
    tracemalloc.start()
    diversity = DiversityFilter(THRESHOLD)
    for _ in range(count):
        diversity.add(invent_caption(rng))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1e6


def _cpu_s(work: Callable[[], Any]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


if __name__ == "__main__":
    main()
