"""The evaluator's scores are those of offline evaluation."""

import io

import numpy as np
import pytest
from PIL import Image

from selma_ray.errors import CaptionError
from selma_ray.evaluation.scoring import score_images
from selma_ray.service import open_scorer
from selma_ray.serving.encoding import decode_upload, encode

PROMPT = "two blue bananas to the left of a red car"


@pytest.fixture(scope="module")
def scorer():
    return open_scorer("miniature")


def test_online_scores_equal_offline_ones(scorer) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    questions = scorer.questions(PROMPT)
    offline = {
        name: score_images(scorer._judge, images, [questions] * 3, rule)
        for name, rule in {"dsg": "official", "dsg_dpg": "dpg", "dsg_selma": "selma"}.items()
    }
    uploaded = [decode_upload(encode(image, "png"), 10**6) for image in images]
    online = [scorer.score([image], [questions])[0] for image in uploaded]
    for index, judged in enumerate(online):
        assert judged.scores.keys() == set(scorer.metrics)
        for name, scores in offline.items():
            assert judged.scores[name] == scores[index].score
        # Batched with others or alone, the judge's probabilities differ in their last bits.
        wanted = offline["dsg"][index].questions
        assert [each.answer for each in judged.questions] == [each.answer for each in wanted]
        assert [each.p_yes for each in judged.questions] == pytest.approx([each.p_yes for each in wanted], abs=1e-4)
        assert 0 <= judged.scores["soft_dsg"] <= judged.scores["soft_tifa_am"] <= 1


def test_a_prompt_without_questions_is_named(scorer) -> None:
    with pytest.raises(CaptionError, match="democracy"):
        scorer.questions("democracy")


def test_an_upload_is_the_image_that_was_drawn() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(decode_upload(encode(image, "png"), 256)), np.asarray(image))
    assert Image.open(io.BytesIO(encode(image, "png"))).mode == "RGB"
