from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from selma_ray.errors import JudgeError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.questions import Question
from selma_ray.judging.scoring import score_images
from selma_ray.models.locate import locate_judge
from tests.unit.judging.tiny_judges import save_tiny_miniature_judge, save_tiny_vilt

QUESTIONS = [
    (Question(1, "whole", "is there a cup?"), Question(2, "color", "is the cup red?", (1,))),
    (Question(1, "whole", "are there two apples?"),),
    (
        Question(1, "whole", "is there a car?"),
        Question(2, "color", "is the car blue?", (1,)),
        Question(3, "whole", "is the picture green?"),
    ),
]


@pytest.fixture(scope="module", params=[save_tiny_vilt, save_tiny_miniature_judge])
def judge_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("judges") / "judge")


def test_answers_depend_neither_on_the_batch_nor_on_its_order(judge: Any, judge_dir: Path, images: Any) -> None:
    together = score_images(judge, images, QUESTIONS)
    alone = [score_images(judge, [image], [asked])[0] for image, asked in zip(images, QUESTIONS, strict=True)]
    backwards = score_images(judge, images[::-1], QUESTIONS[::-1])[::-1]
    one_by_one = score_images(open_judge(JudgeConfig(name=str(judge_dir), batch_size=1)), images, QUESTIONS)
    for other in (alone, backwards, one_by_one):
        for left, right in zip(together, other, strict=True):
            assert [each.answer for each in left.questions] == [each.answer for each in right.questions]
            torch.testing.assert_close(
                [each.p_yes for each in left.questions], [each.p_yes for each in right.questions], atol=1e-5, rtol=0
            )
            assert left.score == right.score


def test_an_unreadable_image_is_null_with_a_reason_and_spares_the_others(
    judge: Any, images: Any, tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(_png_bytes(images[1], tmp_path)[:100])
    corrupt = Image.open(tmp_path / "cut.png")
    scores = score_images(judge, [images[0], corrupt, None], QUESTIONS)
    expected = score_images(judge, images[:1], QUESTIONS[:1])[0]
    assert scores[0].score == expected.score
    assert (scores[1].score, scores[2].score) == (None, None)
    assert "truncated" in scores[1].questions[0].reason
    assert [each.answer for each in scores[2].questions] == [None] * 3
    assert scores[2].questions[0].reason == "there is no image"


def test_judge_is_named_with_its_revision(judge: Any, judge_dir: Path) -> None:
    name, _, revision = judge.name.partition("@")
    assert name in ("miniature", str(judge_dir))
    assert revision == locate_judge(str(judge_dir)).revision


def test_a_folder_that_is_no_judge_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(JudgeError, match="visual question answering") as caught:
        open_judge(JudgeConfig(name=str(tmp_path)))
    assert "\n" not in str(caught.value)


def _png_bytes(image: Any, folder: Any) -> bytes:
    image.save(folder / "whole.png")
    return (folder / "whole.png").read_bytes()
