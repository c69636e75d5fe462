"""An experiment's experts taken as one: each draws the captions of its own skill."""

from collections.abc import Mapping, Sequence
from functools import reduce

from selma_ray.evaluation.summary import ModelScores
from selma_ray.judging.questions import PromptWithQuestions

__all__ = ["joined", "on_own_skills"]


def on_own_skills(
    models: Mapping[str, ModelScores], arm: str, suite: Sequence[PromptWithQuestions]
) -> ModelScores | None:
    """Return what an experiment's experts scored on the captions of their skills; None where a skill of the suite has no expert."""
    skill_of = {prompt.id: prompt.skill for prompt in suite}
    experts = {skill: models.get(f"{arm}.{skill}") for skill in sorted(set(skill_of.values()))}
    shares = [_share(scores, skill, skill_of) for skill, scores in experts.items() if scores is not None]
    return reduce(joined, shares) if len(shares) == len(experts) else None


def joined(one: ModelScores, other: ModelScores) -> ModelScores:
    """Return the scores of two sets of images as those of one model."""
    return ModelScores(
        one.scorer,
        one.images | other.images,
        one.unreadable_answers + other.unreadable_answers,
        one.unscored | other.unscored,
    )


def _share(scores: ModelScores, skill: str, skill_of: Mapping[str, str]) -> ModelScores:
    """Return the scores of the images of one skill's captions."""
    images = {key: parts for key, parts in scores.images.items() if skill_of.get(key[0]) == skill}
    unscored = {key: reason for key, reason in scores.unscored.items() if skill_of.get(key[0]) == skill}
    return ModelScores(scores.scorer, images, 0, unscored)  # unreadable answers are not told apart by caption
