"""Which images the report shows: the same prompt and seed by base and merged, with what each got wrong."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from selma_ray.evaluation.scores import images_scored
from selma_ray.evaluation.summary import BASE, MERGED
from selma_ray.judging.dsg import mean_score
from selma_ray.storage import RunFolder

__all__ = [
    "ComparedQuestion",
    "Example",
    "GivenAnswer",
    "choose_examples",
    "drawn_seeds",
    "paired_examples",
    "read_images",
    "training_images",
]

ImageKey = tuple[str, int]


@dataclass(frozen=True)
class GivenAnswer:
    """What the judge answered, and whether it counts: a yes, with a yes to what the question depends on; None where unreadable."""

    text: str | None
    counted: bool | None


@dataclass(frozen=True)
class ComparedQuestion:
    """One question and the answers for base and for merged."""

    question: str
    category: str
    base: GivenAnswer
    merged: GivenAnswer


@dataclass(frozen=True)
class Example:
    """One prompt and seed, rendered by both models."""

    prompt: str
    skill: str
    seed: int
    base: float
    merged: float
    verdicts: tuple[ComparedQuestion, ...]

    @property
    def gain(self) -> float:
        """Return merged minus base."""
        return self.merged - self.base

    @property
    def key(self) -> ImageKey:
        """Return what names the image in a model's files."""
        return (self.prompt, self.seed)


def paired_examples(folder: RunFolder, files: Mapping[str, Mapping[str, Sequence[str]]], scorer: str) -> list[Example]:
    """Return every prompt and seed that both models have a readable image of, in the order of the suite."""
    scored = {
        model: images_scored(folder.read_table(files[model]["answers"]).to_pylist(), scorer) for model in (BASE, MERGED)
    }
    examples = []
    for image, base in scored[BASE].items():
        merged = scored[MERGED].get(image, [])
        scores = [mean_score(score for _, score in answers) for answers in (base, merged)]
        if scores[0] is None or scores[1] is None:
            continue
        verdicts = tuple(
            ComparedQuestion(row["question"], row["category"], _answered(row, before), _answered(other, after))
            for (row, before), (other, after) in zip(base, merged, strict=True)
        )
        row = base[0][0]
        examples.append(Example(row["prompt"], row["skill"], row["seed"], scores[0], scores[1], verdicts))
    return examples


def choose_examples(examples: Sequence[Example], per_skill: int, extremes: int) -> dict[str, list[Example]]:
    """Return {"first": the first of each skill, unselected; "gains", "losses": the largest of each}."""
    first: dict[str, list[Example]] = {}
    for example in examples:
        shown = first.setdefault(example.skill, [])
        if len(shown) < per_skill and all(example.prompt != other.prompt for other in shown):
            shown.append(example)
    by_gain = sorted(examples, key=lambda example: -example.gain)
    return {
        "first": [example for shown in first.values() for example in shown],
        "gains": [example for example in by_gain[:extremes] if example.gain > 0],
        "losses": [example for example in by_gain[::-1][:extremes] if example.gain < 0],
    }


def read_images(folder: RunFolder, paths: Sequence[str], wanted: set[ImageKey]) -> dict[ImageKey, Image.Image]:
    """Return the wanted images of one model that could be drawn; files are read one at a time."""
    found: dict[ImageKey, Image.Image] = {}
    for path in paths:
        if wanted <= found.keys():
            break
        table = folder.read_table([path], columns=["prompt", "seed", "image"])
        for index, key in enumerate(zip(table["prompt"].to_pylist(), table["seed"].to_pylist(), strict=True)):
            if key in wanted and (image := table["image"][index].as_py()) and image["bytes"]:
                found[key] = _decoded(image)
    return found


def drawn_seeds(folder: RunFolder, paths: Sequence[str]) -> dict[str, int]:
    """Return by prompt the smallest seed that one model drew it from."""
    table = folder.read_table(paths, columns=["prompt", "seed"])
    seeds: dict[str, int] = {}
    for prompt, seed in zip(table["prompt"].to_pylist(), table["seed"].to_pylist(), strict=True):
        seeds[prompt] = min(seed, seeds.get(prompt, seed))
    return seeds


def training_images(folder: RunFolder, skill: str, count: int) -> list[Image.Image]:
    """Return up to `count` rendered training images of a skill, spread evenly over its files and rows."""
    paths = folder.files("images", f"skill={skill}", suffix=".parquet")
    images: list[Image.Image] = []
    for position, path in enumerate(paths):
        share = -(-(count - len(images)) // (len(paths) - position))
        table = folder.read_table([path], columns=["image", "split"]).to_pylist()
        rows = [row["image"] for row in table if row["split"] == "train" and row["image"] and row["image"]["bytes"]]
        step = max(1, len(rows) // max(share, 1))
        images += [_decoded(row) for row in rows[::step][:share]]
        if len(images) >= count:
            break
    return images[:count]


def _decoded(row: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["bytes"])).convert("RGB")


def _answered(row: Mapping[str, Any], score: float | None) -> GivenAnswer:
    return GivenAnswer(row["answer"], None if score is None else score == 1.0)
