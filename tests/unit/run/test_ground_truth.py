import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.images.config import ImagesConfig
from selma_ray.images.shards import read_images
from selma_ray.miniature.parsing import parse_caption
from selma_ray.miniature.skills import is_test_caption
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.pool import PromptPool
from selma_ray.prompts.store import read_prompts
from selma_ray.run.ground_truth import draw_images, write_captions
from selma_ray.skills import load_skills
from selma_ray.storage import RunFolder

CONFIG = PromptsConfig(per_skill=20, dev_fraction=0.1)
SKILLS = ["counting", "unusual"]


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = RunFolder(str(tmp_path / "run"))
    write_captions(folder, SKILLS, CONFIG, seed=0)
    return folder


def prompts_of(folder: Any, skill: Any) -> Any:
    return [row["prompt"] for row in read_prompts(folder, skill).to_pylist()]


def test_captions_stand_where_the_llm_s_prompts_would_and_leave_nothing_to_ask_for(folder: Any) -> None:
    pool = PromptPool(load_skills([f"miniature/{skill}" for skill in SKILLS]), CONFIG, 0, folder)
    assert pool.complete
    assert [read_prompts(folder, skill, "dev").num_rows for skill in SKILLS] == [2, 2]


def test_captions_differ_are_no_test_captions_and_depend_on_the_seed(folder: Any, tmp_path: Path) -> None:
    captions = [caption for skill in SKILLS for caption in prompts_of(folder, skill)]
    assert len(set(captions)) == 40
    assert not any(map(is_test_caption, captions))
    same, other, excluding = (RunFolder(str(tmp_path / name)) for name in ("same", "other", "excluding"))
    write_captions(same, SKILLS, CONFIG, seed=0)
    write_captions(other, SKILLS, CONFIG, seed=1)
    write_captions(excluding, SKILLS, CONFIG, seed=0, excluded=captions[:3])
    assert prompts_of(same, "unusual") == prompts_of(folder, "unusual")
    assert prompts_of(other, "unusual") != prompts_of(folder, "unusual")
    assert not set(captions[:3]) & set(prompts_of(excluding, "counting"))


def test_scenes_of_training_prompts_are_drawn_once_and_the_same_again(folder: Any) -> None:
    rows = read_prompts(folder, "counting").to_pylist()
    drawn = list(draw_images(folder, rows, ImagesConfig(per_prompt=2), seed=0))
    images = read_images(folder, "counting")
    assert len(drawn) == 18
    assert images.num_rows == 36
    assert set(images["split"].to_pylist()) == {"train"}
    first = images.to_pylist()[0]
    assert Image.open(io.BytesIO(first["image"]["bytes"])).size == (64, 64)
    assert parse_caption(first["prompt"])
    list(draw_images(folder, rows, ImagesConfig(per_prompt=2), seed=0))
    assert read_images(folder, "counting").equals(images)


def test_what_the_miniature_cannot_say_or_draw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs skills of the miniature .*, got whoops; take llm"):
        write_captions(folder, ["whoops"], CONFIG, seed=0)
    row = {"id": "a", "skill": "counting", "index": 0, "prompt": "a stock market crash", "split": "train"}
    with pytest.raises(ConfigError, match=r"data\.images ground_truth needs captions of the miniature"):
        list(draw_images(folder, [row], ImagesConfig(), seed=0))
    monkeypatch.setattr("selma_ray.miniature.world.sample_caption", lambda *_, **__: "a red apple")
    with pytest.raises(ConfigError, match=r"must be at most the captions that common has \(1 were found\), got 20"):
        write_captions(folder, ["common"], CONFIG, seed=0)
