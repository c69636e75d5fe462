"""All judges behind one interface: batches, order, bad images, nonsense, choices, memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from selma_ray.errors import JudgeError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.asking import as_yes_or_no, ask_images
from selma_ray.judging.judges.interface import Answer
from selma_ray.judging.judges.opening import ChoosingJudge, judge_identity, open_judge
from selma_ray.judging.judges.vllm_vlm import compose_question
from selma_ray.judging.questions import Question
from selma_ray.judging.scoring import score_images
from tests.unit.judging.tiny_judges import save_tiny_blip, save_tiny_miniature_judge, save_tiny_vilt

QUESTIONS = [
    ["is there a cup?", "is the cup red?"],
    ["are there two apples?"],
    ["is there a car?", "is the car blue, or red, or green, or what is it?", "is it?"],
]


@pytest.fixture(scope="module", params=[save_tiny_vilt, save_tiny_blip, save_tiny_miniature_judge])
def judge_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param(tmp_path_factory.mktemp("judges") / "judge")


def assert_same(left: Any, right: Any) -> None:
    assert [each.text for each in left] == [each.text for each in right]
    assert [each.p_yes for each in left] == pytest.approx([each.p_yes for each in right], abs=1e-5)
    for one, other in zip(left, right, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_answers_depend_neither_on_the_batch_nor_on_its_order(judge: Any, judge_dir: Any, images: Any) -> None:
    together = judge.answer(images, QUESTIONS)
    small = open_judge(JudgeConfig(name=str(judge_dir), batch_size=1)).answer(images, QUESTIONS)
    backwards = judge.answer(images[::-1], QUESTIONS[::-1])[::-1]
    for index in range(3):
        assert_same(together[index], small[index])
        assert_same(together[index], backwards[index])


def test_yes_and_no_have_probabilities_that_agree_with_p_yes(judge: Any, images: Any) -> None:
    for answers in judge.answer(images, QUESTIONS):
        for answer in answers:
            assert set(answer.probabilities) == {"yes", "no"}
            assert all(0 <= chance <= 1 for chance in answer.probabilities.values())
            assert 0 <= answer.p_yes <= 1
            assert (answer.p_yes > 0.5) == (answer.probabilities["yes"] > answer.probabilities["no"])


def test_blips_probabilities_are_its_own_decoders(tmp_path: Path, images: Any) -> None:
    """Against transformers' forward pass of one unpadded question."""
    judge = open_judge(JudgeConfig(name=str(save_tiny_blip(tmp_path / "blip"))))
    model, processor = judge._model, judge._processor  # type: ignore[attr-defined]
    words = processor.tokenizer.get_vocab()
    for image, asked, answers in zip(images, QUESTIONS, judge.answer(images, QUESTIONS), strict=True):
        for question, answer in zip(asked, answers, strict=True):
            inputs = processor(images=image, text=question, return_tensors="pt")
            generated = model.generate(**inputs, max_new_tokens=10, return_dict_in_generate=True, output_logits=True)
            chances = generated.logits[0][0].float().softmax(-1)
            assert answer.probabilities["yes"] == pytest.approx(float(chances[words["yes"]]), abs=1e-5)
            assert answer.text == processor.decode(generated.sequences[0], skip_special_tokens=True).strip()


def test_blip_encodes_an_image_once_for_all_its_questions(tmp_path: Path, images: Any) -> None:
    judge = open_judge(JudgeConfig(name=str(save_tiny_blip(tmp_path / "blip"))))
    encoded = []
    judge._model.vision_model.register_forward_hook(lambda *_: encoded.append(1))  # type: ignore[attr-defined]
    judge.answer(images[:1], [["is there a cup?", "is the cup red?", "is it?", "are there two apples?"]])
    assert len(encoded) == 1


def test_choices_that_a_judge_knows_have_probabilities(tmp_path: Path, images: Any) -> None:
    vilt = open_judge(JudgeConfig(name=str(save_tiny_vilt(tmp_path / "vilt"))))
    (answer,) = vilt.answer(images[:1], [["how many cups?"]], [[("two", "three")]])[0]
    assert set(answer.probabilities) == {"two"}  # its label "2", in other words
    miniature = open_judge(JudgeConfig(name=str(save_tiny_miniature_judge(tmp_path / "miniature"))))
    (answer,) = miniature.answer(images[:1], [["how many cups?"]], [[("1", "two", "many")]])[0]
    assert set(answer.probabilities) == {"1", "two"}


class Scripted:
    """Answers from a script; fails on images of one colour, and on batches that are too large."""

    name = "scripted"

    def __init__(self, text: str = "yes", p_yes: Any = None, bad: Any = None, most: int = 100) -> None:
        self.reply, self.bad, self.most = Answer(text, p_yes), bad, most
        self.batches: list[Any] = []

    def answer(self, images: Any, questions: Any, choices: Any = None) -> Any:
        self.batches.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(image.getpixel((0, 0)) == self.bad for image in images):
            raise RuntimeError("a kernel failed\non this image")
        return [[self.reply for _ in asked] for asked in questions]


def test_an_image_that_breaks_the_judge_spares_the_others() -> None:
    judge = Scripted(bad=(255, 0, 0))
    images = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "blue", "red", "blue", "blue")]
    answered = ask_images(judge, images, [["a?", "b?"]] * 5)
    assert [answers[0].text for answers in answered] == ["yes", "yes", None, "yes", "yes"]
    assert answered[2][1].reason.startswith("RuntimeError: a kernel failed")
    assert len(judge.batches) <= 7


def test_corrupt_images_of_every_kind_are_named_and_cost_no_other_batch(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "blue")
    faulty = []
    for kind in ("png", "jpeg", "webp", "gif"):
        image.save(tmp_path / f"whole.{kind}")
        content = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) // 2])
        try:
            faulty.append(Image.open(tmp_path / f"cut.{kind}"))
        except OSError:
            continue  # not even opened: whoever reads the file gives None
    assert len(faulty) >= 2
    judge = Scripted()
    answered = ask_images(judge, [image, *faulty, None], [["a?"]] * (len(faulty) + 2))
    assert judge.batches == [1]
    assert answered[0][0].text == "yes"
    assert all(answers[0].reason.startswith("the image cannot be read") for answers in answered[1:-1])


def test_a_batch_that_does_not_fit_is_halved() -> None:
    judge = Scripted(most=3)
    images = [Image.new("RGB", (8, 8))] * 8
    assert all(answers[0].text == "yes" for answers in ask_images(judge, images, [["a?"]] * 8))
    assert judge.batches == [8, 4, 2, 2, 4, 2, 2]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Answer("yes"), "yes"),
        (Answer("Yes."), "yes"),
        (Answer(" NO!"), "no"),
        (Answer("maybe", 0.7), "yes"),
        (Answer("2", 0.2), "no"),
        (Answer("no bus"), None),
        (Answer(None, reason="broken"), None),
    ],
)
def test_answers_to_yes_no_questions_are_yes_no_or_null(given: Any, text: Any) -> None:
    read = as_yes_or_no(given)
    assert read.text == text
    assert (read.reason is None) == (text is not None)


def test_nonsense_is_null_with_its_words_and_never_scored_zero() -> None:
    image = Image.new("RGB", (8, 8))
    asked = (Question(1, "whole", "is there a cup?"), Question(2, "color", "is it red?", (1,)))
    (score,) = score_images(Scripted("banana"), [image], [asked])
    assert score.score is None
    assert score.questions[0].reason == "the judge answered 'banana', neither yes nor no"
    (score,) = score_images(Scripted("Yes."), [image], [asked])
    assert score.score == 1.0


class FirstChoice:
    name = "first"

    def nearest(self, text: Any, candidates: Any) -> Any:
        return candidates[0]


def test_free_answers_become_choices_and_yes_no_questions_stay() -> None:
    judge = ChoosingJudge(Scripted("crimson", 0.9), FirstChoice())
    image = Image.new("RGB", (8, 8))
    answers = judge.answer([image], [["what colour?", "is it red?"]], [[("red", "blue"), ()]])[0]
    assert [each.text for each in answers] == ["red", "crimson"]
    assert judge.name == "scripted+first"


def test_questions_with_choices_count_where_the_choice_is_the_gold_answer() -> None:
    image = Image.new("RGB", (8, 8))
    asked = (
        Question(1, "color", "what colour?", (), ("red", "blue"), "red"),
        Question(2, "color", "what colour?", (), ("red", "blue"), "blue"),
    )
    (score,) = score_images(ChoosingJudge(Scripted("crimson"), FirstChoice()), [image], [asked])
    assert [each.counted for each in score.questions] == [True, False]
    assert [each.answer for each in score.questions] == ["red", "red"]
    (score,) = score_images(Scripted("crimson"), [image], [asked])
    assert score.score is None
    assert "none of the choices" in score.questions[0].reason


def test_the_vllm_prompt_asks_once_for_yes_or_no() -> None:
    assert compose_question("Is it red?") == "Is it red? Please answer yes or no."
    asked = 'Does this figure show "a cat"? Please answer yes or no.'
    assert compose_question(asked) == asked
    assert "red, blue" in compose_question("What colour?", ("red", "blue"))


def test_identity_tells_what_answers_depend_on(tmp_path: Path) -> None:
    folder = str(save_tiny_vilt(tmp_path / "vilt"))
    plain = judge_identity(JudgeConfig(name=folder))
    assert plain == judge_identity(JudgeConfig(name=folder, batch_size=2))
    assert plain != judge_identity(JudgeConfig(name=folder, embedder=folder))
    assert "prompt" in judge_identity(JudgeConfig(name=folder, engine="vllm"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(JudgeError, match="JSON configuration"):
        judge_identity(JudgeConfig(name=str(tmp_path)))
