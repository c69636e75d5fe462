import random
from typing import Any

import pytest
import torch

from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges import miniature
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.suites import open_suite
from selma_ray.miniature.captions import parse_caption
from selma_ray.miniature.judge import MiniatureJudge
from selma_ray.miniature.locate import judge_dir
from selma_ray.miniature.scenes import render_scene

SUITE = open_suite("miniature", 12)
IMAGES = [render_scene(parse_caption(prompt.prompt), random.Random(0)) for prompt in SUITE]
QUESTIONS = [[each.question for each in prompt.questions] for prompt in SUITE]


def test_answers_are_those_of_the_model_without_kept_questions() -> None:
    judge, plain = open_judge(JudgeConfig(batch_size=5)), MiniatureJudge.from_pretrained(judge_dir())
    expected = plain.probability_yes(plain.encode_images(IMAGES), QUESTIONS)
    for _ in range(2):  # the second time every question is known
        answers = judge.answer(IMAGES, QUESTIONS)
        for given, chances in zip(answers, expected, strict=True):
            torch.testing.assert_close([each.p_yes for each in given], chances, atol=1e-5, rtol=0)


@pytest.mark.parametrize("questions", [[[], ["Is there a car?"]], [[], []]])
def test_an_image_may_be_asked_nothing(questions: Any) -> None:
    answers = open_judge(JudgeConfig()).answer(IMAGES[:2], questions)
    assert [len(each) for each in answers] == [len(each) for each in questions]


def test_kept_questions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "_MOST_ENCODED", 3)
    judge = open_judge(JudgeConfig(batch_size=1))
    first = judge.answer(IMAGES, QUESTIONS)
    assert len(judge._encoded) <= 3 + max(map(len, QUESTIONS))  # type: ignore[attr-defined]
    again = judge.answer(IMAGES, QUESTIONS)
    assert [[each.text for each in row] for row in first] == [[each.text for each in row] for row in again]
