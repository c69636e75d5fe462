"""Pictures of a study: a row for each model, columns of the same captions and seeds."""

import io
from pathlib import Path

import pyarrow as pa
from PIL import Image

from selma_ray.config import validate
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.pictures import png_bytes
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder
from selma_ray.study.config import StudyConfig
from selma_ray.study.pictures import write_pictures
from selma_ray.study.study import Study

COLOURS = {"base": 40, "selma.merged": 200}
PROMPTS = [("counting", "two cats"), ("counting", "three dogs"), ("counting", "one"), ("style", "a cat, as a sketch")]
FAILED = ("selma.merged", 1)
SUITE = [PromptWithQuestions(str(number), skill, prompt, ()) for number, (skill, prompt) in enumerate(PROMPTS)]


def score(study: Study, model: str, order: list[int]) -> None:
    """Write one file of images; a prompt's is told by its green, a model's by its red."""
    rows = []
    for number in order:
        skill, prompt = PROMPTS[number]
        content = png_bytes(Image.new("RGB", (64, 64), (COLOURS[model], 50 * number, 0)))
        image = None if (model, number) == FAILED else {"bytes": content, "path": None}
        rows += [
            {
                "id": f"{number}-{seed}", "skill": skill, "prompt": prompt, "split": "test", "image_index": 0, "seed": seed,
                "image": image, "model": model, "revision": "0", "scheduler": "DDIMScheduler", "steps": 1,
                "guidance_scale": 1.0, "width": 64, "height": 64, "error": None,
            }
            for seed in (number, 100 + number)
        ]  # fmt: skip
    folder = RunFolder(study.place("scores", "seed=0", "guidance=1"))
    folder.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA), "evaluation", model, "images", "0.parquet")


def test_models_are_rows_and_the_first_captions_of_each_skill_are_columns(tmp_path: Path) -> None:
    config = {"recipe": "r.yaml", "seeds": [0], "guidance_scales": [1.0], "arms": {"selma": {"title": "SELMA"}}}
    recipe = {"run_dir": str(tmp_path), "skills": ["miniature/common"]}
    study = Study(validate(StudyConfig, config, "test"), validate(Recipe, recipe, "test"))
    score(study, "base", [2, 0, 3, 1])  # as renderers finish
    score(study, "selma.merged", [3, 2, 1, 0])
    path = write_pictures(study, SUITE, 0, 1.0, {"base": "base", "selma.merged": "SELMA"})
    assert path == study.place("pictures-guidance=1.png")
    picture = Image.open(io.BytesIO(Path(path).read_bytes()))
    cell_px, gap_px, title_px = 128, 6, 24
    for row, model in enumerate(COLOURS):
        top = gap_px + title_px + row * (title_px + cell_px + gap_px) + 10
        shown = [picture.getpixel((gap_px + column * (cell_px + gap_px) + 10, top)) for column in range(3)]
        grey = (128, 128, 128)
        assert shown == [
            grey if (model, number) == FAILED else (COLOURS[model], 50 * number, 0) for number in (0, 1, 3)
        ]
    assert picture.size[0] == 2 * gap_px + 3 * cell_px + 2 * gap_px
