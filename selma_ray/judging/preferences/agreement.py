"""How well scores agree with people's preferences, each as its own release counts it."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from selma_ray.errors import JudgeError

__all__ = ["imagereward_accuracy", "inversion_score", "pickscore_accuracy"]

_Choice = Literal["first", "second", "tie"]


def pickscore_accuracy(
    labels: Sequence[float], probabilities: Sequence[tuple[float, float]], threshold: float = 0.0
) -> float:
    """Return PickScore's accuracy over pairs (eval_preference_predictor.py).

    A label is 1 where people prefer the first image, 0 for the second, 0.5 for a tie. Probabilities that differ by no more than
    `threshold` are a tie, and a tie that only one side sees counts half.
    """
    _same_length(labels, probabilities)
    earned = 0.0
    for label, (first, second) in zip(labels, probabilities, strict=True):
        people: _Choice = "tie" if label == 0.5 else "first" if label == 1 else "second"
        model: _Choice = "tie" if abs(second - first) <= threshold else "first" if first > second else "second"
        earned += 1.0 if people == model else 0.5 if "tie" in (people, model) else 0.0
    return earned / len(labels)


def imagereward_accuracy(rankings: Sequence[Sequence[int]], rewards: Sequence[Sequence[float]]) -> float:
    """Return ImageReward's accuracy over all pairs of a prompt's images that people rank differently (test.py).

    Rank 1 is the best; equal rewards are wrong.
    """
    _same_length(rankings, rewards)
    right = total = 0
    for ranks, given in zip(rankings, rewards, strict=True):
        _same_length(ranks, given)
        for (rank, reward), (other_rank, other_reward) in combinations(zip(ranks, given, strict=True), 2):
            total += rank != other_rank
            right += (rank - other_rank) * (reward - other_reward) < 0
    if not total:
        raise JudgeError(
            "ImageReward's accuracy needs a pair of images of different ranks, got none; give more rankings"
        )
    return right / total


def inversion_score(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Return HPSv2's agreement of two rankings: 1 minus the share of pairs that they order oppositely (train.py)."""
    _same_length(predicted, gold)
    pairs = list(combinations(zip(predicted, gold, strict=True), 2))
    if not pairs:
        raise JudgeError(f"an inversion score needs at least two ranks, got {len(gold)}; give more")
    return 1 - sum((first[0] - second[0]) * (first[1] - second[1]) < 0 for first, second in pairs) / len(pairs)


def _same_length(left: Sequence[object], right: Sequence[object]) -> None:
    if len(left) != len(right) or not left:
        raise JudgeError(
            f"rankings and scores must be as many, and some, got {len(left)} and {len(right)}; give one for each"
        )
