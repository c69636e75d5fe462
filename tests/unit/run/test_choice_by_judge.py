import random
from typing import Any

import pytest

from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.sources import GrammarQuestions, OrWhole
from selma_ray.miniature.captions import parse_caption
from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.scenes import render_scene
from selma_ray.run.generate import open_scorer


@pytest.fixture(scope="module")
def score() -> Any:
    return open_scorer(JudgeConfig(), OrWhole(GrammarQuestions()))


def test_the_judge_prefers_the_image_that_follows_the_prompt(score: Any) -> None:
    captions = heldout_by_skill()["counting"][:6]
    images = [render_scene(parse_caption(caption), random.Random(0)) for caption in captions]
    right = score(images, captions)
    wrong = score(images[1:] + images[:1], captions)
    assert sum(right) / 6 > 0.9  # the judge answers 99% of such questions right
    assert sum(wrong) < sum(right)


def test_a_caption_that_a_real_language_model_wrote_is_judged_as_a_whole(score: Any) -> None:
    image = render_scene(parse_caption(heldout_by_skill()["counting"][0]), random.Random(0))
    (chance,) = score([image], ["a zeppelin over Paris at dawn, oil on canvas"])
    assert 0 < chance < 1
