from typing import Any

import pytest

from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.summary import model_scores, prompt_totals, score_table, summarise
from selma_ray.judging.questions import PromptWithQuestions, Question

SUITE = [
    PromptWithQuestions("a", "common", "a red cup", (Question(1, "whole", "?"), Question(2, "color", "?", (1,)))),
    PromptWithQuestions("b", "counting", "two cups", tuple(Question(number, "count", "?") for number in (1, 2, 3, 4))),
]
CONFIG = EvaluationConfig(bootstrap_resamples=200)


def rows(prompt: PromptWithQuestions, answers: Any, seed: int = 0) -> Any:
    return [
        {
            "prompt_id": prompt.id,
            "seed": seed,
            "question_id": each.id,
            "category": each.category,
            "parents": each.parents,
            "answer": answer,
            "p_yes": {"yes": 0.9, "no": 0.1}.get(answer),
            "reason": None if answer else "the image is torn",
        }
        for each, answer in zip(prompt.questions, answers, strict=True)
    ]


def figures(answers: Any, scorer: str = "official") -> Any:
    summary = summarise({"base": model_scores(answers, scorer)}, SUITE, CONFIG, 0, {})
    return summary.as_dict()["models"]["base"]


def test_official_averages_prompts_and_selma_averages_questions() -> None:
    answers = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[1], ["yes", "no", "no", "no"])
    assert figures(answers)["dsg"] == pytest.approx((1 + 0.25) / 2)
    assert figures(answers, "selma")["dsg"] == pytest.approx(3 / 6)


def test_every_scorer_reads_the_same_answers() -> None:
    answers = rows(SUITE[0], ["no", "yes"]) + rows(SUITE[1], ["yes"] * 4)
    metrics = figures(answers)["metrics"]
    assert list(metrics) == ["official", "dpg", "selma", "soft_dsg"]
    assert [metrics[name]["mean"] for name in ("official", "dpg", "selma")] == pytest.approx([0.5, 0.5, 4 / 6])
    # P(yes) is 0.9 for a yes and 0.1 for a no: the geometric mean of 0.1 and 0.9 is 0.3.
    assert metrics["soft_dsg"]["mean"] == pytest.approx((0.3 + 0.9) / 2)


def test_a_prompt_weighs_one_however_many_of_its_images_could_be_read() -> None:
    answers = (
        rows(SUITE[0], ["yes", "yes"])
        + rows(SUITE[0], ["no", "yes"], seed=1)
        + rows(SUITE[1], [None] * 4)
        + rows(SUITE[1], ["yes"] * 4, seed=1)
    )
    scores = model_scores(answers, "official")
    sums_P, counts_P = prompt_totals(scores, ("metric", "official"), {"a": 0, "b": 1}, scores.images)
    assert (sums_P.tolist(), counts_P.tolist()) == ([0.5, 1.0], [1, 1])
    base = figures(answers)
    assert (base["images"], base["unreadable_answers"]) == (4, 4)
    assert base["seeds"]["means"] == [1.0, 0.5]
    assert base["seeds"]["deviation"] == pytest.approx(0.5 / 2**0.5)


def test_an_unreadable_prompt_is_left_out_named_and_not_zero() -> None:
    answers = rows(SUITE[0], ["yes", None]) + rows(SUITE[1], [None] * 4)
    base = figures(answers)
    assert (base["dsg"], base["skills"]) == (1.0, {"common": 1.0, "counting": None})
    assert base["categories"]["color"] is None
    assert base["unreadable_answers"] == 5
    assert base["unscored"] == {
        "images": 1,
        "reasons": {"the image is torn": 1},
        "first": [{"prompt_id": "b", "seed": 0, "reason": "the image is torn"}],
    }


def compared(base: Any, merged: Any, **others: Any) -> Any:
    scores = {
        name: model_scores(answers, "official") for name, answers in {"base": base, "merged": merged, **others}.items()
    }
    return summarise(scores, SUITE, CONFIG, 0, {}).as_dict()


def test_the_difference_compares_prompts_that_both_models_have() -> None:
    base = rows(SUITE[0], ["yes", "no"]) + rows(SUITE[1], ["no"] * 4)
    merged = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[1], [None] * 4)
    difference = compared(base, merged)["difference"]
    assert (difference["mean"], difference["wins"], difference["ties"]) == (0.5, 1, 0)
    assert difference["categories"]["color"]["mean"] == 1.0
    assert difference["skills"]["counting"] is None


def test_a_seed_that_one_model_lost_is_left_out_for_both() -> None:
    base = rows(SUITE[0], ["no", "no"]) + rows(SUITE[0], ["yes", "yes"], seed=1)
    merged = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[0], [None, None], seed=1)
    difference = compared(base, merged)["difference"]
    assert (difference["mean"], difference["wins"]) == (1.0, 1)


def test_every_model_is_tested_against_base_and_tables_are_corrected() -> None:
    base = rows(SUITE[0], ["yes", "no"]) + rows(SUITE[1], ["no"] * 4)
    better = rows(SUITE[0], ["yes", "yes"]) + rows(SUITE[1], ["yes"] * 4)
    summary = compared(base, better, counting=base)
    assert summary["difference"] == summary["differences"]["merged"]
    same = summary["differences"]["counting"]
    assert (same["mean"], same["p_sign"], same["p_bootstrap"]) == (0, 1, 1)
    categories = summary["difference"]["categories"]
    for row in categories.values():
        assert row["p_bootstrap"] <= row["p_bootstrap_holm"] <= len(categories) * row["p_bootstrap"]


def test_without_base_there_is_no_difference() -> None:
    summary = summarise({"merged": model_scores(rows(SUITE[0], ["yes", "no"]), "official")}, SUITE, CONFIG, 0, {})
    assert summary.difference is None
    assert summary.as_dict()["differences"] == {}


def test_a_question_with_choices_counts_by_its_gold_answer() -> None:
    answers = rows(SUITE[0], ["surfer", "swimmer"])
    for row in answers:
        row["gold"] = "surfer"
    assert figures(answers)["dsg"] == 0.5


def test_a_table_has_a_row_for_each_image_and_null_where_there_is_no_score() -> None:
    answers = rows(SUITE[0], ["yes", "no"]) + rows(SUITE[1], [None] * 4)
    for row in answers:
        row |= {"skill": "s", "prompt": "p", "judge": "j"}
    table = score_table("base", model_scores(answers, "official"), answers).to_pylist()
    assert [(row["prompt_id"], row["official"], row["reason"]) for row in table] == [
        ("a", 0.5, None),
        ("b", None, "the image is torn"),
    ]
