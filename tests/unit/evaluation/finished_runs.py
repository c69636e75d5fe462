"""A run's folder as the finished stages leave it, with drawn scenes for images and random answers."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.judge_error import judge_error_summary
from selma_ray.evaluation.summary import model_scores, summarise
from selma_ray.judging.dsg import Answered, mean_score, official
from selma_ray.judging.suites import open_suite
from selma_ray.miniature.captions import parse_caption
from selma_ray.miniature.scenes import render_scene
from selma_ray.records import ANSWER_SCHEMA, IMAGE_SCHEMA, content_id
from selma_ray.storage import RunFolder

SKILLS = ["common", "paragraphs", "counting", "unusual", "style"]
CHANCES = {
    "base": 0.62,
    "common": 0.66,
    "paragraphs": 0.7,
    "counting": 0.68,
    "unusual": 0.65,
    "style": 0.7,
    "merged": 0.76,
}
JUDGE = "miniature@0123456789abcdef"
RECIPE = "model: {name: miniature}\nmerging: {name: merged}\nseed: 0\n"


def write_finished_run(folder: Path, max_prompts: int = 40) -> RunFolder:
    """Write evaluation, training curves, merge report, training images and done markers."""
    run, config = RunFolder(str(folder)), EvaluationConfig(bootstrap_resamples=400)
    suite = open_suite("miniature", max_prompts)
    run.write_bytes(RECIPE.encode(), "recipe.yaml")
    scores, files, answers_of = {}, {}, {}
    for model, chance in CHANCES.items():
        answers = [row for prompt in suite for row in _answers(model, prompt, chance)]
        images = [_image(model, prompt.prompt, prompt.skill) for prompt in suite]
        files[model] = {kind: [f"evaluation/{model}/{kind}/0.parquet"] for kind in ("images", "answers")}
        run.write_table(pa.Table.from_pylist(images, IMAGE_SCHEMA), files[model]["images"][0])
        run.write_table(pa.Table.from_pylist(answers, ANSWER_SCHEMA), files[model]["answers"][0])
        scores[model] = model_scores(answers, "official")
        answers_of[model] = answers
    details = {
        "scorer": "official", "judge": JUDGE, "suite": "miniature", "seeds": [0],
        "sampling": config.sampling.model_dump(), "resamples": 400, "files": files,
        "judges": {}, "compare_with": {}, "judge_error": judge_error_summary(answers_of, list(_known()), _score_of, "base", 50, 0),
    }  # fmt: skip
    run.mark_done("evaluate", summarise(scores, suite, config, 0, details).as_dict())
    _write_earlier_stages(run, suite)
    return run


def _score_of(rows: Any) -> Any:
    return mean_score(official([Answered(row["question_id"], row["answer"], row["parents"]) for row in rows]))


def _known() -> Iterator[Any]:
    """Yield answers with known truth of a judge that errs one time in twenty."""
    rng = random.Random(1)
    for category in ("whole", "color", "count", "spatial", "background", "style"):
        for number in range(60):
            truth = number % 2 == 0
            right = rng.random() > 0.05
            p_yes = rng.uniform(0.6, 1) if truth == right else rng.uniform(0, 0.4)
            yield {"category": category, "answer": "yes" if truth == right else "no", "p_yes": p_yes, "truth": truth}


def _answers(model: Any, prompt: Any, chance: Any) -> Iterator[Any]:
    rng = random.Random(f"{model} {prompt.id}")
    for each in prompt.questions:
        yield {
            "model": model, "skill": prompt.skill, "prompt_id": prompt.id, "prompt": prompt.prompt, "seed": 1,
            "question_id": each.id, "category": each.category, "question": each.question, "parents": list(each.parents),
            "answer": "yes" if rng.random() < chance else "no", "p_yes": 0.5, "reason": None, "judge": JUDGE,
        }  # fmt: skip


def _image(model: Any, caption: Any, skill: Any, image_index: int = 0) -> Any:
    image = render_scene(parse_caption(caption), random.Random(f"{model} {caption} {image_index}"))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {
        "id": content_id(model=model, caption=caption, image_index=image_index), "skill": skill, "prompt": caption, "split": "test",
        "image_index": image_index, "seed": 1, "image": {"bytes": buffer.getvalue(), "path": "image.png"}, "model": model,
        "revision": "0", "scheduler": "", "steps": 1, "guidance_scale": 1.0, "width": 64, "height": 64, "error": None,
    }  # fmt: skip


def _write_earlier_stages(run: Any, suite: Any) -> None:
    rng = random.Random(0)
    for skill in SKILLS:
        points = [
            {"step": step, "loss": 0.3 / (1 + step / 40) + 0.05 * rng.random(), "learning_rate": 5e-4}
            for step in range(1, 101)
        ]
        run.write_json(points, "experts", skill, "curve.json")
        dev = [{"step": step, "dsg": 0.6 + 0.001 * step * rng.random(), "images": 20} for step in (25, 50, 75, 100)]
        run.write_json(dev, "experts", skill, "dev_scores.json")
        rows = [
            _image("base", prompt.prompt, skill, index)
            for prompt in suite
            if prompt.skill == skill
            for index in range(2)
        ]
        run.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA), "images", f"skill={skill}", "0.parquet")
    count = len(SKILLS)
    cosine = [[1.0 if row == column else 0.12 - 0.03 * row for column in range(count)] for row in range(count)]
    report = {
        "experts": SKILLS, "rank": 16, "norms": dict.fromkeys(SKILLS, 0.41), "merged_norm": 0.22, "cosine": cosine, "energy_kept": 0.63,
        "modules": {}, "key": "0", "method": "average_deltas", "scale": 1.0, "weights": dict.fromkeys(SKILLS, 1 / count),
    }  # fmt: skip
    run.write_json(report, "merged", "merged", "report.json")
    prompts = {
        skill: {"kept": 40, "rejected": 7, "requests": 6, "reasons": {"too similar": 4, "too long": 3}}
        for skill in SKILLS
    }
    images = {skill: {"rendered": 38, "failed": 0} for skill in SKILLS}
    run.mark_done("generate", {"prompts": {"skills": prompts}, "images": {"skills": images}})
