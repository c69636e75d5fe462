"""Metrics of a finished evaluation's images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.score_images import main
from selma_ray.errors import JudgeError
from selma_ray.evaluation.image_metrics import ScoreImagesConfig, score_run
from selma_ray.judging.metrics import MetricScore
from selma_ray.judging.preferences.convert import clip_from_open_clip
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder
from tests.unit.judging import tiny_preferences as tiny

PROMPTS = ["a red cup", "two dogs", "a car"]
CONFIG = ScoreImagesConfig(bootstrap_resamples=100)


class Brightness:
    """How bright an image is, in the place of a model."""

    name = "brightness@1"

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def score(self, images: Any, prompts: Any, questions: Any = None) -> Any:
        self.batches.append(len(images))
        return [
            MetricScore(None, "no image") if image is None else MetricScore(float(np.asarray(image).mean()))
            for image in images
        ]


def _row(model: Any, prompt: Any, seed: Any, content: Any, error: Any = None) -> Any:
    return {
        "id": f"{model}{prompt}{seed}", "skill": "common", "prompt": prompt, "split": "test", "image_index": 0, "seed": seed,
        "image": None if content is None else {"bytes": content, "path": "x.png"}, "model": model, "revision": "0", "scheduler": "",
        "steps": 1, "guidance_scale": 1.0, "width": 8, "height": 8, "error": error,
    }  # fmt: skip


def _png(level: Any) -> Any:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Base at brightness 100 and merged at 120; one image of merged failed, one is no image."""
    folder = RunFolder(str(tmp_path / "run"))
    files = {}
    for model, level in (("base", 100), ("merged", 120)):
        rows = [_row(model, prompt, seed, _png(level)) for prompt in PROMPTS for seed in (0, 1)]
        if model == "merged":
            rows[0] = _row(model, PROMPTS[0], 0, None, "rendering failed")
            rows[2] = _row(model, PROMPTS[1], 0, b"no image")
        files[model] = {"images": [f"evaluation/{model}/images/0.parquet"]}
        folder.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA), files[model]["images"][0])
    folder.mark_done("evaluate", {"files": files})
    return folder


def test_figures_pair_models_by_prompt_and_name_what_has_no_score(run: Any) -> None:
    result = score_run(run, CONFIG, Brightness)
    assert result["models"]["base"]["mean"] == 100
    assert result["models"]["merged"]["mean"] == 120
    assert result["models"]["merged"]["over_base"]["mean"] == pytest.approx(20)
    assert result["models"]["base"]["over_base"] is None
    assert result["models"]["merged"]["unscored"] == {"rendering failed": 1, "no image": 1}
    assert run.read_json("evaluation", "metrics", "clipscore.json") == result


def test_a_file_is_scored_once_and_again_by_another_model(run: Any) -> None:
    metric = Brightness()
    first = score_run(run, CONFIG, lambda: metric)
    assert metric.batches == [6, 6]
    assert score_run(run, CONFIG, lambda: metric) == first
    assert metric.batches == [6, 6]
    metric.name = "brightness@2"
    score_run(run, CONFIG, lambda: metric)
    assert metric.batches == [6, 6, 6, 6]


def test_bad_input_is_named(tmp_path: Path, run: Any) -> None:
    with pytest.raises(JudgeError, match="has no finished evaluation"):
        score_run(RunFolder(str(tmp_path / "other")), CONFIG, Brightness)
    with pytest.raises(JudgeError, match=r"metric must be one of clipscore, .* got 'dsg'"):
        score_run(run, ScoreImagesConfig(metric="dsg"))


def test_the_job_scores_a_run_with_a_model_in_a_folder(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = tiny.character_tokenizer(tmp_path / "letters")
    clip_from_open_clip(tiny.open_clip_weights(len(letters)), tiny.clip_config(letters)).save_pretrained(
        tmp_path / "clip"
    )
    letters.save_pretrained(tmp_path / "clip")
    assert main([run.path(), "metric=pickscore", f"model={tmp_path / 'clip'}", "bootstrap_resamples=100"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["metric"].startswith("pickscore:")
    assert result["models"]["merged"]["images"] == 6
    for arguments, code in (([], 2), ([run.path(), "metrik=x"], 2), ([run.path(), "metric=dsg"], 1)):
        assert main(arguments) == code
        assert capsys.readouterr().err.count("\n") == 1
