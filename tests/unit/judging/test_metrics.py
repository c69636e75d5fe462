"""Metrics by name, from one judge's answers or from models of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selma_ray.errors import JudgeError
from selma_ray.judging.judges.interface import Answer
from selma_ray.judging.metrics import ANSWER_METRICS, METRICS, MODEL_METRICS, metrics_of_answers, open_metric
from selma_ray.judging.preferences.convert import clip_from_open_clip, image_reward_from_release
from selma_ray.judging.questions import Question
from tests.unit.judging import tiny_preferences as tiny

QUESTIONS = (
    Question(1, "whole", "is there a cup?"),
    Question(2, "color", "is it red?", (1,)),
    Question(3, "count", "how many?", (1,), ("2", "3"), "3"),
)
ANSWERS = [
    Answer("no", 0.2, None, {"yes": 0.1, "no": 0.4}),
    Answer("Yes.", 0.8, None, {"yes": 0.72, "no": 0.18}),
    Answer("3", None, None, {"2": 0.25, "3": 0.5}),
]


class Fixed:
    name = "fixed@1"

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def answer(self, images: Any, questions: Any, choices: Any = None) -> Any:
        self.asked.append(questions)
        return [self.answers[: len(asked)] for asked in questions]


def test_every_metric_of_answers() -> None:
    scores = metrics_of_answers(QUESTIONS, ANSWERS)
    assert scores.keys() == ANSWER_METRICS.keys()
    assert scores["dsg"] == scores["dsg_dpg"] == scores["dsg_selma"] == 0.0  # the parent of both others is a no
    assert scores["tifa"] == pytest.approx(2 / 3)
    assert scores["soft_dsg"] == pytest.approx((0.2 * 0.8) ** 0.5)
    assert scores["soft_tifa_am"] == pytest.approx((0.1 + 0.72 + 0.5) / 3)
    assert scores["soft_tifa_gm"] == pytest.approx((0.1 * 0.72 * 0.5) ** (1 / 3))


def test_what_cannot_be_read_is_null_and_never_zero() -> None:
    scores = metrics_of_answers(QUESTIONS, [Answer(None, reason="broken")] * 3)
    assert set(scores.values()) == {None}
    (score,) = open_metric("dsg", Fixed([Answer("banana")])).score([Image.new("RGB", (8, 8))], ["a"], [QUESTIONS[:1]])
    assert (score.value, score.reason) == (None, "the judge answered 'banana', neither yes nor no")


def test_opened_metrics_agree_with_those_of_the_answers() -> None:
    images = [Image.new("RGB", (8, 8)), None]
    for name, expected in metrics_of_answers(QUESTIONS, ANSWERS).items():
        metric = open_metric(name, Fixed(ANSWERS))
        assert metric.name == f"{name}:fixed@1"
        first, second = metric.score(images, ["a", "b"], [QUESTIONS, QUESTIONS])
        assert first.value == expected
        assert (second.value, second.reason) == (None, "there is no image")


def test_vqascore_asks_its_own_question_and_takes_the_raw_probability() -> None:
    judge = Fixed(ANSWERS)
    (score,) = open_metric("vqascore", judge).score([Image.new("RGB", (8, 8))], ["a cat"])
    assert judge.asked == [(['Does this figure show "a cat"? Please answer yes or no.'],)]
    assert score.value == 0.1


def test_wrong_names_and_missing_parts_are_named() -> None:
    with pytest.raises(JudgeError, match=r"metric must be one of dsg, .* got 'dgs'"):
        open_metric("dgs")
    with pytest.raises(JudgeError, match="metric dsg needs a judge"):
        open_metric("dsg")
    with pytest.raises(JudgeError, match="needs the questions"):
        open_metric("dsg", Fixed(ANSWERS)).score([None], ["a"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    letters, words = tiny.character_tokenizer(folder / "letters"), tiny.word_tokenizer(folder / "words")
    clip_from_open_clip(tiny.open_clip_weights(len(letters)), tiny.clip_config(letters)).save_pretrained(
        folder / "clip"
    )
    letters.save_pretrained(folder / "clip")
    reward = image_reward_from_release(tiny.release_weights(len(words)), tiny.image_reward_config(len(words)))
    reward.save_pretrained(folder / "reward")
    words.save_pretrained(folder / "reward")
    return {name: str(folder / ("reward" if name == "imagereward" else "clip")) for name in MODEL_METRICS}


@pytest.mark.parametrize("name", MODEL_METRICS)
def test_metrics_with_models_spare_other_images_a_bad_one(models: Any, name: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    good = [Image.fromarray(image) for image in pixels]
    good[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    metric = open_metric(name, model=models[name], batch_size=2)
    assert metric.name.startswith(f"{name}:")
    scores = metric.score([good[0], Image.open(tmp_path / "cut.png"), None, good[1]], ["a cup", "b", "c", "a dog"])
    alone = [metric.score([image], [prompt])[0].value for image, prompt in ((good[0], "a cup"), (good[1], "a dog"))]
    assert [scores[0].value, scores[3].value] == pytest.approx(alone, abs=1e-4)
    assert scores[1].reason.startswith("the image cannot be read")
    assert scores[2].reason == "there is no image"


def test_the_names_are_fixed() -> None:
    """Recipes, requests and reports carry them."""
    assert METRICS == (
        "dsg", "dsg_dpg", "dsg_selma", "soft_dsg", "tifa", "soft_tifa_am", "soft_tifa_gm", "vqascore", "clipscore", "pickscore",
        "hpsv2", "hpsv2.1", "imagereward",
    )  # fmt: skip
