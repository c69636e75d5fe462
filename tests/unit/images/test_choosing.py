"""Choosing among images that were rendered before, without Ray."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.images.choosing import ChooseImages
from selma_ray.images.config import ImageChoiceConfig
from selma_ray.images.shards import candidate_shards, existing_ids, image_summary, read_images
from selma_ray.images.shards import write_candidates as write
from selma_ray.images.writing import WriteImages
from selma_ray.storage import RunFolder
from tests.unit.images.test_shards import row, table

CONFIG = ImageChoiceConfig(keep_best=1, min_score=0.1)
SCORES = {"red": 0.2, "lime": 0.9, "blue": None}
COLOURS = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def candidate(
    id_: str, prompt: str, index: int, colour: str = "red", error: str | None = None, skill: str = "one"
) -> Any:
    return {**row(id_, skill, error, colour), "prompt": prompt, "image_index": index}


def open_scorer() -> Any:
    return lambda images, prompts: [SCORES[COLOURS[image.getpixel((0, 0))]] for image in images]


def chosen(folder: RunFolder) -> dict[str, tuple[str, float | None]]:
    rows = [each for skill in ("one", "two") for each in read_images(folder, skill).to_pylist()]
    return {each["id"]: (each["split"], each["score"] and round(each["score"], 3)) for each in rows}


def choose(folder: RunFolder) -> None:
    ChooseImages(folder, CONFIG, open_scorer)({"path": candidate_shards(folder)})


def test_the_best_image_of_each_prompt_is_chosen_and_the_others_are_kept_with_their_scores(folder: RunFolder) -> None:
    write(folder, table(
        candidate("a0", "a", 0), candidate("a1", "a", 1, "lime"), candidate("b0", "b", 0, "blue"),
        candidate("c0", "c", 0, skill="two"),
    ))  # fmt: skip
    assert existing_ids(folder) == {"a0", "a1", "b0", "c0"}, "what waits for a judge is not rendered again"
    assert image_summary(folder, ["one", "two"])["rendered"] == 0
    choose(folder)
    assert chosen(folder) == {
        "a0": ("rejected", 0.2), "a1": ("train", 0.9), "b0": ("rejected", None), "c0": ("train", 0.2),
    }  # fmt: skip
    assert candidate_shards(folder) == []


def test_the_images_of_a_prompt_are_found_together_however_their_rows_came(folder: RunFolder) -> None:
    write(folder, table(candidate("a0", "a", 0), candidate("b0", "b", 0), candidate("a1", "a", 1, "lime")))
    choose(folder)
    assert {id_: split for id_, (split, _) in chosen(folder).items()} == {
        "a0": "rejected",
        "a1": "train",
        "b0": "train",
    }


def test_a_failed_image_is_rejected_beside_others_and_a_failure_where_it_is_alone(folder: RunFolder) -> None:
    lost = "ValueError: no"
    write(folder, table(
        candidate("a0", "a", 0, error=lost), candidate("a1", "a", 1), candidate("b0", "b", 0, error=lost),
    ))  # fmt: skip
    assert image_summary(folder, ["one"])["failed"] == 1
    choose(folder)
    assert chosen(folder) == {"a0": ("rejected", None), "a1": ("train", 0.2)}


def test_a_stage_that_was_killed_while_it_chose_goes_on_with_the_same_rows(folder: RunFolder) -> None:
    rows = table(candidate("a0", "a", 0), candidate("a1", "a", 1, "lime"))
    write(folder, rows)
    choose(folder)
    before = chosen(folder)
    write(folder, rows)  # as if the process had been killed before it deleted them
    choose(folder)
    assert chosen(folder) == before
    assert len(folder.files("images", suffix=".parquet")) == 2  # one of each split


def test_rendered_rows_wait_for_the_judge_where_images_are_chosen_later(folder: RunFolder) -> None:
    rendered = table({**candidate("a0", "a", 0), "seconds": 0.1, "batch": "key", "again": False})
    WriteImages(folder, unjudged=True)(rendered)
    assert len(candidate_shards(folder)) == 1
    assert folder.files("images", suffix=".parquet") == []
