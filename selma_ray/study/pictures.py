"""A study's pictures: the same captions from the same seeds, drawn by the base and by every model that an experiment ends in."""

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image

from selma_ray.evaluation.examples import drawn_seeds, read_images
from selma_ray.evaluation.summary import BASE
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.pictures import picture_grid, png_bytes
from selma_ray.study.study import Study

__all__ = ["write_pictures"]

_PER_SKILL = 2
_CELL_PX = 128
_NOT_DRAWN = Image.new("RGB", (_CELL_PX, _CELL_PX), (128, 128, 128))
_LINE_LETTERS, _LINES = 24, 3  # of a caption below a cell


def write_pictures(
    study: Study, suite: Sequence[PromptWithQuestions], seed: int, guidance_scale: float, titles: Mapping[str, str]
) -> str:
    """Write pictures-guidance=<scale>.png of scored images, a row for each of the models in `titles`, and return its place.

    Columns are the suite's first two captions of each skill, which stand below the last row; an image that could not be drawn is left grey.
    """
    scored = study.scores(seed, guidance_scale)
    files = {model: scored.files("evaluation", model, "images", suffix=".parquet") for model in titles}
    seeds = drawn_seeds(scored, files[BASE])
    chosen = [(prompt, seeds[prompt]) for prompt in _first_of_each_skill(suite) if prompt in seeds]
    rows = []
    for model in titles:
        images = read_images(scored, files[model], set(chosen))
        rows.append([images.get(key, _NOT_DRAWN) for key in chosen])
    below = tuple(textwrap.fill(prompt, _LINE_LETTERS, max_lines=_LINES, placeholder="…") for prompt, _ in chosen)
    captions = [()] * (len(rows) - 1) + [below]
    picture = picture_grid(rows, _CELL_PX, titles=list(titles.values()), captions=captions)
    folder, name = study.results, f"pictures-guidance={guidance_scale:g}.png"
    folder.write_bytes(png_bytes(picture), name)
    return folder.path(name)


def _first_of_each_skill(suite: Sequence[PromptWithQuestions]) -> list[str]:
    taken: dict[str, list[str]] = {}
    for each in suite:
        of_skill = taken.setdefault(each.skill, [])
        if len(of_skill) < _PER_SKILL and each.prompt not in of_skill:
            of_skill.append(each.prompt)
    return [prompt for of_skill in taken.values() for prompt in of_skill]
