"""A study's pictures: the same captions from the same seeds, drawn by the base and by every model that an experiment ends in."""

import textwrap
from collections.abc import Mapping

from selma_ray.evaluation.examples import read_images
from selma_ray.evaluation.summary import BASE
from selma_ray.pictures import picture_grid, png_bytes
from selma_ray.storage import RunFolder
from selma_ray.study.study import Study

__all__ = ["write_pictures"]

_PER_SKILL = 2
_CELL_PX = 128
_LINE_LETTERS, _LINES = 24, 3  # of a caption below a cell


def write_pictures(study: Study, seed: int, guidance_scale: float, titles: Mapping[str, str]) -> str:
    """Write pictures-guidance=<scale>.png of scored images, a row for each of the models in `titles`, and return its place.

    Columns are the first two captions of each skill, which stand below the last row.
    """
    scored = RunFolder(study.place("scores", f"seed={seed}", f"guidance={guidance_scale:g}"))
    files = {model: scored.files("evaluation", model, "images", suffix=".parquet") for model in titles}
    chosen = _first_of_each_skill(scored, files[BASE])
    rows = []
    for model in titles:
        images = read_images(scored, files[model], set(chosen))
        rows.append([images[key] for key in chosen])
    below = [textwrap.shorten(prompt, _LINE_LETTERS * _LINES, placeholder="…") for prompt, _ in chosen]
    captions = [()] * (len(rows) - 1) + [tuple(textwrap.fill(caption, _LINE_LETTERS) for caption in below)]
    picture = picture_grid(rows, _CELL_PX, titles=list(titles.values()), captions=captions)
    folder, name = RunFolder(study.place()), f"pictures-guidance={guidance_scale:g}.png"
    folder.write_bytes(png_bytes(picture), name)
    return folder.path(name)


def _first_of_each_skill(folder: RunFolder, paths: list[str]) -> list[tuple[str, int]]:
    """Return prompt and seed of the first image of the first prompts of each skill, skill by skill."""
    table = folder.read_table(paths, columns=["skill", "prompt", "seed"])
    first: dict[str, dict[str, int]] = {}
    for row in table.to_pylist():
        of_skill = first.setdefault(row["skill"], {})
        if len(of_skill) < _PER_SKILL:
            of_skill.setdefault(row["prompt"], row["seed"])
    return [(prompt, seed) for of_skill in first.values() for prompt, seed in of_skill.items()]
