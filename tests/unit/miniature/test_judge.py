from pathlib import Path

import pytest
import torch
from PIL import Image

from selma_ray.errors import JudgeError
from selma_ray.miniature.judge import ANSWERS, JudgeModel, MiniatureJudge, MiniatureJudgeConfig
from selma_ray.miniature.pretrain.judge import build_judge_tokenizer
from selma_ray.miniature.pretrain.question_bank import QuestionBank

QUESTIONS = ["Is there a banana?", "Are the bananas blue?", "How many cars are there?"]


@pytest.fixture(scope="module")
def judge() -> MiniatureJudge:
    torch.manual_seed(0)
    tokenizer = build_judge_tokenizer(QuestionBank().texts)
    return MiniatureJudge(JudgeModel(MiniatureJudgeConfig(vocab_size=len(tokenizer), temperature=1.5)), tokenizer)


def make_images() -> list[Image.Image]:
    return [Image.effect_noise((64, 64), 40 + 20 * place).convert("RGB") for place in range(3)]


def test_a_saved_judge_answers_alike(judge: MiniatureJudge, tmp_path: Path) -> None:
    images = make_images()
    judge.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = MiniatureJudge.from_pretrained(tmp_path)
    assert again.model.config.temperature == 1.5
    first = judge.answer(judge.encode_images(images), [QUESTIONS] * 3)
    second = again.answer(again.encode_images(images), [QUESTIONS] * 3)
    torch.testing.assert_close(first, second)


def test_answers_do_not_depend_on_the_batch(judge: MiniatureJudge) -> None:
    images = make_images()
    together = judge.answer(judge.encode_images(images), [QUESTIONS, QUESTIONS[:1], []])
    assert [tuple(scores.shape) for scores in together] == [(3, len(ANSWERS)), (1, len(ANSWERS)), (0, len(ANSWERS))]
    alone = judge.answer(judge.encode_images(images[:1]), [QUESTIONS[::-1]])[0]
    torch.testing.assert_close(together[0], alone.flip(0), atol=1e-5, rtol=1e-4)
    chances = judge.probability_yes(judge.encode_images(images), [QUESTIONS[:2]] * 3)
    assert all(0 <= chance <= 1 for row in chances for chance in row)


def test_a_folder_without_a_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"config\.json"):
        MiniatureJudge.from_pretrained(tmp_path)
