import pytest

from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.questions import PromptWithQuestions, Question
from selma_ray.evaluation.scores import model_scores, summarise

SUITE = [
    PromptWithQuestions("a", "common", "a red cup", (Question(1, "whole", "?"), Question(2, "color", "?", (1,)))),
    PromptWithQuestions("b", "counting", "two cups", tuple(Question(number, "count", "?") for number in (1, 2, 3, 4))),
]
CONFIG = EvaluationConfig(bootstrap_resamples=200)


def rows(prompt: PromptWithQuestions, answers, seed=0):
    return [
        {
            "prompt_id": prompt.id,
            "seed": seed,
            "question_id": each.id,
            "category": each.category,
            "parents": each.parents,
            "answer": answer,
        }
        for each, answer in zip(prompt.questions, answers, strict=True)
    ]


def test_official_averages_prompts_and_selma_averages_questions():
    answers = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[1], ["yes", "no", "no", "no"])
    official, selma = (model_scores(answers, SUITE, scorer) for scorer in ("official", "selma"))
    assert official.sums.sum() / official.counts.sum() == pytest.approx((1 + 0.25) / 2)
    assert selma.sums.sum() / selma.counts.sum() == pytest.approx(3 / 6)


def test_a_prompt_weighs_one_however_many_of_its_images_could_be_read():
    answers = (
        rows(SUITE[0], ["yes", "yes"])
        + rows(SUITE[0], ["no", "yes"], seed=1)
        + rows(SUITE[1], [None] * 4)
        + rows(SUITE[1], ["yes"] * 4, seed=1)
    )
    scores = model_scores(answers, SUITE, "official")
    assert scores.sums.tolist() == [0.5, 1.0]
    assert scores.counts.tolist() == [1, 1]
    assert (scores.images, scores.unreadable_answers) == (4, 4)


def test_an_unreadable_prompt_is_left_out_and_not_zero():
    answers = rows(SUITE[0], ["yes", None]) + rows(SUITE[1], [None] * 4)
    summary = summarise({"base": model_scores(answers, SUITE, "official")}, SUITE, CONFIG, 0, {}).as_dict()
    base = summary["models"]["base"]
    assert (base["dsg"], base["skills"]) == (1.0, {"common": 1.0, "counting": None})
    assert base["categories"]["color"] is None
    assert base["unreadable_answers"] == 5
    assert summary["difference"] is None


def test_the_difference_compares_prompts_that_both_models_have():
    base = rows(SUITE[0], ["yes", "no"]) + rows(SUITE[1], ["no"] * 4)
    merged = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[1], [None] * 4)
    scores = {name: model_scores(answers, SUITE, "official") for name, answers in (("base", base), ("merged", merged))}
    difference = summarise(scores, SUITE, CONFIG, 0, {}).as_dict()["difference"]
    assert (difference["mean"], difference["wins"], difference["ties"]) == (0.5, 1, 0)
    assert difference["categories"]["color"]["mean"] == 1.0
    assert difference["skills"]["counting"] is None
