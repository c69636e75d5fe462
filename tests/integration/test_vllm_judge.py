"""A judge in vLLM on the CPU: a small random vision-language model, its plumbing against transformers' own forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Idefics3ForConditionalGeneration

from selma_ray.errors import JudgeError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.asking import ask_images
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.judges.vllm_vlm import compose_question
from tests.unit.judging.tiny_judges import save_tiny_idefics3

pytestmark = pytest.mark.heavy  # vLLM takes half a minute to start

QUESTIONS = [
    ["is there a cup ?", "is the cup red ?"],
    ["are there two apple ?"],
    ["is there a car ?", "is the car blue ?", "is the picture green ?"],
]
TOLERANCE = 2e-3  # float32 in other kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_idefics3(tmp_path_factory.mktemp("judges") / "idefics3")


@pytest.fixture(scope="module")
def judge(folder: Any) -> Any:
    return open_judge(JudgeConfig(name=str(folder), dtype="float32", max_model_len=256, batch_size=8))


@pytest.fixture(scope="module")
def images() -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


@pytest.fixture(scope="module")
def chances(folder: Any) -> Any:
    """P(yes) and P(no) of the first token, by transformers."""
    model = Idefics3ForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    words = processor.tokenizer.get_vocab()

    @torch.inference_mode()
    def read(image: Any, question: Any) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": compose_question(question)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        logits = model(**processor(images=[image], text=text, return_tensors="pt")).logits[0, -1].float().softmax(-1)
        return {word: float(logits[words[word]] + logits[words[word.capitalize()]]) for word in ("yes", "no")}

    return read


def test_probabilities_are_those_of_transformers(judge: Any, images: Any, chances: Any) -> None:
    answered = judge.answer(images, QUESTIONS)
    for image, asked, answers in zip(images, QUESTIONS, answered, strict=True):
        for question, answer in zip(asked, answers, strict=True):
            expected = chances(image, question)
            assert answer.probabilities == pytest.approx(expected, abs=TOLERANCE)
            assert answer.p_yes == pytest.approx(expected["yes"] / (expected["yes"] + expected["no"]), abs=TOLERANCE)
            assert answer.text == ("yes" if answer.p_yes > 0.5 else "no")
    values = [answer.p_yes for answers in answered for answer in answers]
    assert max(values) - min(values) > 0.01  # images and questions matter


def test_answers_depend_neither_on_the_batch_nor_on_its_order(judge: Any, images: Any) -> None:
    together = judge.answer(images, QUESTIONS)
    alone = [judge.answer([image], [asked])[0] for image, asked in zip(images, QUESTIONS, strict=True)]
    backwards = judge.answer(images[::-1], QUESTIONS[::-1])[::-1]
    for other in (alone, backwards):
        for left, right in zip(together, other, strict=True):
            assert [each.text for each in left] == [each.text for each in right]
            assert [each.p_yes for each in left] == pytest.approx([each.p_yes for each in right], abs=TOLERANCE)


def test_a_corrupt_image_has_its_own_reason_and_spares_the_others(judge: Any, images: Any, tmp_path: Path) -> None:
    images[1].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    answered = ask_images(judge, [images[0], Image.open(tmp_path / "cut.png"), None], QUESTIONS)
    expected = judge.answer(images[:1], QUESTIONS[:1])[0]
    assert [each.p_yes for each in answered[0]] == pytest.approx([each.p_yes for each in expected], abs=TOLERANCE)
    assert "truncated" in answered[1][0].reason
    assert answered[2][0].reason == "there is no image"


def test_choices_are_answered_in_words_with_their_own_probabilities(judge: Any, images: Any) -> None:
    (answer,) = judge.answer(images[:1], [["what picture ?"]], [[("apple", "car", "red cup")]])[0]
    assert answer.text
    assert set(answer.probabilities) == {"apple", "car"}  # a choice of two tokens has none
    assert all(0 < chance < 1 for chance in answer.probabilities.values())


def test_the_name_tells_the_revision_and_the_prompt(judge: Any, folder: Any) -> None:
    assert judge.name.startswith(f"{folder}@")
    assert judge.name.endswith("#v1")


def test_a_folder_that_vllm_cannot_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense", "vision_config": {}}')
    with pytest.raises(JudgeError, match="cannot be run by vLLM") as caught:
        open_judge(JudgeConfig(name=str(tmp_path)))
    assert "\n" not in str(caught.value)
