import io
import json
from pathlib import Path

import datasets
import pytest
import webdataset
import yaml
from PIL import Image

from selma_ray.errors import ConfigError
from selma_ray.images import export
from selma_ray.images.card import card_text, write_card
from selma_ray.images.config import ImagesConfig
from selma_ray.images.export import export_images
from selma_ray.images.shards import read_images, write_shards
from selma_ray.images.sheet import contact_sheet, random_rows
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.images.test_shards import row, table

SKILLS = ["one", "two"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Return a run with three training images, a rejected and a failed one."""
    folder = RunFolder(str(tmp_path / "run"))
    rows = [row("b", colour="blue"), row("a"), row("c", "two", colour="lime"), row("r", split="rejected")]
    write_shards(folder, table(*rows))
    write_shards(folder, table(row("f", "two", error="ValueError: no")))
    return folder


@pytest.fixture
def card(folder: RunFolder, tiny_pipeline_dir: Path) -> str:
    return card_text(folder, SKILLS, ImagesConfig(license="mit"), ModelConfig(name=str(tiny_pipeline_dir)), "some-llm")


@pytest.fixture
def target(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "out"))


def test_an_imagefolder_is_opened_by_datasets(folder: RunFolder, target: RunFolder, card: str, tmp_path: Path) -> None:
    assert export_images(folder, SKILLS, "imagefolder", target, card) == 3
    opened = datasets.load_dataset("imagefolder", data_dir=target.uri, split="train", cache_dir=str(tmp_path / "cache"))
    by_id = {entry["id"]: entry for entry in opened}
    assert sorted(by_id) == ["a", "b", "c"]
    assert by_id["b"]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert (by_id["c"]["prompt"], by_id["c"]["skill"], by_id["c"]["seed"]) == ("prompt of c", "two", 7)


@pytest.mark.parametrize("prompt", ["a cat", "3 кота на столе", "一只猫\u2028坐着", 'a "red" sign, no. 5'])
def test_every_exported_image_has_its_caption_beside_it(
    folder: RunFolder, tmp_path: Path, card: str, prompt: str
) -> None:
    write_shards(folder, table({**row("p"), "prompt": prompt}))
    images = RunFolder(str(tmp_path / "images"))
    assert export_images(folder, SKILLS, "imagefolder", images, card) == 4
    pictures = [Path(images.uri, path) for path in images.files("train", suffix=".png")]
    captions = {picture.stem: picture.with_suffix(".txt").read_bytes().decode() for picture in pictures}
    assert captions == {"a": "prompt of a", "b": "prompt of b", "c": "prompt of c", "p": prompt}
    metadata = map(json.loads, images.read_bytes("train", "metadata.jsonl").decode().splitlines())
    assert {line["file_name"].split("/")[-1].split(".")[0]: line["prompt"] for line in metadata} == captions
    archive = RunFolder(str(tmp_path / "archive"))
    assert export_images(folder, SKILLS, "webdataset", archive, card) == 4
    samples = webdataset.WebDataset(archive.path("train-000000.tar"), shardshuffle=False)
    assert {sample["__key__"]: sample["txt"].decode() for sample in samples} == captions


def test_a_webdataset_is_opened_by_webdataset_and_by_datasets(
    folder: RunFolder, target: RunFolder, card: str, tmp_path: Path
) -> None:
    assert export_images(folder, SKILLS, "webdataset", target, card) == 3
    shard = target.path("train-000000.tar")
    samples = list(webdataset.WebDataset(shard, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == ["a", "b", "c"]
    assert samples[1]["png"].getpixel((0, 0)) == (0, 0, 255)
    assert samples[2]["txt"] == "prompt of c"
    assert samples[2]["json"]["skill"] == "two"
    opened = datasets.load_dataset("webdataset", data_files=shard, split="train", cache_dir=str(tmp_path / "cache"))
    assert opened[1]["png"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("limit", "value"), [("_SAMPLES_PER_SHARD", 2), ("_BYTES_PER_SHARD", 100)])
def test_large_webdatasets_are_several_shards(
    folder: RunFolder, target: RunFolder, card: str, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(export, limit, value)
    assert export_images(folder, SKILLS, "webdataset", target, card) == 3
    shards = [target.path(path) for path in target.files(suffix=".tar")]
    assert len(shards) == 2
    assert [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)] == ["a", "b", "c"]


def test_the_same_images_make_the_same_bytes(folder: RunFolder, tmp_path: Path, card: str) -> None:
    targets = [RunFolder(str(tmp_path / name)) for name in ("first", "second")]
    for target in targets:
        export_images(folder, SKILLS, "webdataset", target, card)
    first, second = (target.read_bytes("train-000000.tar") for target in targets)
    assert first == second


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    folder: RunFolder, target: RunFolder, card: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--to must be one of imagefolder, webdataset, got 'zip'"):
        export_images(folder, SKILLS, "zip", target, card)
    with pytest.raises(ConfigError, match="holds no image of split 'train' to export"):
        export_images(RunFolder(str(tmp_path / "empty")), SKILLS, "imagefolder", target, card)
    assert target.files() == []
    target.write_bytes(b"mine", "notes.txt")
    with pytest.raises(ConfigError, match="must be empty to be exported to"):
        export_images(folder, SKILLS, "imagefolder", target, card)
    assert target.files() == ["notes.txt"]


def test_the_shards_and_their_card_are_opened_as_one_folder(
    folder: RunFolder, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    write_card(folder, SKILLS, ImagesConfig(license="mit"), ModelConfig(name=str(tiny_pipeline_dir)), "some-llm")
    opened = datasets.load_dataset(folder.path("images"), cache_dir=str(tmp_path / "cache"))
    assert {split: sorted(rows["id"]) for split, rows in opened.items()} == {
        "train": ["a", "b", "c"],
        "rejected": ["r"],
    }
    assert isinstance(opened["train"].features["image"], datasets.Image)


@pytest.mark.parametrize("splits", [("train",), ("train", "dev"), ("rejected", "dev", "train"), ("rejected",)])
def test_splits_are_opened_apart_whatever_shards_held_them(
    folder: RunFolder, tiny_pipeline_dir: Path, tmp_path: Path, splits: tuple[str, ...]
) -> None:
    """Shards of an earlier version held rows of all splits, and no scores."""
    folder = RunFolder(str(tmp_path / "mixed"))
    rows = table(*(row(f"{split}{number}", split=split) for split in splits for number in range(3)))
    folder.write_table(rows.drop_columns(["score"]), "images", "skill=one", "0123abcd.parquet")
    write_shards(folder, table(*(row(f"new-{split}", "two", split=split) for split in splits)))
    write_card(folder, SKILLS, ImagesConfig(), ModelConfig(name=str(tiny_pipeline_dir)), "some-llm")
    opened = datasets.load_dataset(folder.path("images"), cache_dir=str(tmp_path / "cache"))
    assert {split: sorted(each["id"]) for split, each in opened.items()} == {
        split: sorted([f"new-{split}", *(f"{split}{number}" for number in range(3))]) for split in splits
    }
    assert read_images(folder, "one").num_rows == 3 * len(splits)


def test_the_card_says_what_the_images_are(card: str) -> None:
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["size_categories"] == ["n<1K"]
    assert "| one | 2 | 1 | 0 |" in card
    assert "| two | 1 | 0 | 1 |" in card
    assert "| guidance scale | 7.5 |" in card
    assert "some-llm" in card


def test_a_contact_sheet_shows_random_images_of_every_skill(folder: RunFolder) -> None:
    page = contact_sheet(folder, SKILLS, per_skill=2, seed=0, suffix=".html").decode()
    assert page.count("<img") == 3
    assert "prompt of c" in page
    picture = Image.open(io.BytesIO(contact_sheet(folder, SKILLS, per_skill=2, seed=0, suffix=".png")))
    assert (0, 255, 0) in {colour for _, colour in picture.getcolors(maxcolors=1 << 16)}
    chosen = [json.dumps([each["id"] for each in random_rows(folder, "one", 2, seed)]) for seed in range(8)]
    assert len(set(chosen)) > 1
    assert chosen == [json.dumps([each["id"] for each in random_rows(folder, "one", 2, seed)]) for seed in range(8)]


def test_a_contact_sheet_of_nothing_or_of_another_kind_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be named .html or .png, got '.gif'"):
        contact_sheet(folder, SKILLS, 2, 0, ".gif")
    with pytest.raises(ConfigError, match="holds no image yet"):
        contact_sheet(RunFolder(str(tmp_path / "empty")), SKILLS, 2, 0, ".png")
