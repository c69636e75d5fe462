"""The loop on captions that no grammar made: every stage takes them as they are.

A language model writes prompts and questions, a tiny pipeline renders, a tiny VLM in vLLM chooses among images, a tiny VQA model scores:
each start of vLLM takes half a minute of a small machine.
Every engine is real and none is good: what is tested is that each stage takes such captions, and that every count is right.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from selma_ray.judging.sources import WHOLE
from tests.unit.judging.tiny_judges import save_tiny_idefics3, save_tiny_vilt

SKILLS = ["coco", "whoops"]
PER_SKILL, DEV, PER_PROMPT = 4, 1, 2
SAMPLING = {"steps": 2, "guidance_scale": 2.0, "width_px": 64, "height_px": 64}


def question(number: int, text: str) -> dict:
    return {"id": number, "category": "whole", "question": text, "parents": []}


@pytest.fixture
def recipe(tmp_path: Path, tiny_pipeline_dir: Path) -> Path:
    suite = [
        {"id": str(row), "skill": SKILLS[row % 2], "prompt": prompt, "questions": [question(1, "is there a cup ?")]}
        for row, prompt in enumerate(("a zeppelin over Paris at dawn", "the spirit of history, oil on canvas"))
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in suite))
    # Its positions are those of its own tokenizer's words.
    judge = {
        "name": str(save_tiny_idefics3(tmp_path / "judge")), "engine": "vllm", "dtype": "float32", "max_model_len": 256, "batch_size": 8
    }  # fmt: skip
    whole = {
        "run_dir": str(tmp_path / "run"), "skills": SKILLS, "model": {"name": str(tiny_pipeline_dir)},
        "prompts": {
            "per_skill": PER_SKILL, "per_request": 4, "requests_in_flight": 1, "max_requests": 40, "dev_fraction": DEV / PER_SKILL,
            "llm": {"name": "miniature", "chat": False, "max_tokens": 256},
        },
        "images": {"per_prompt": PER_PROMPT, "selection": {"judge": judge}, "sampling": SAMPLING},
        "questions": {
            "writer": {"format": "text", "max_examples": 2, "attempts": 1, "llm": {"max_model_len": 2048, "max_tokens": 120}}
        },
        "experts": {
            "steps": 2, "batch_size": 2, "checkpoint_every_steps": 1, "lora": {"rank": 2, "alpha": 2}, "selection": {"every_steps": 2},
        },
        "merging": {"method": "search", "search": {"generations": 1, "candidates": 2, "max_prompts": 1}},
        "evaluation": {
            "suite": str(tmp_path / "suite.jsonl"), "sampling": SAMPLING,
            "judge": {"name": str(save_tiny_vilt(tmp_path / "scorer")), "engine": "transformers"},
        },
        "serving": {"port": 0, "evaluator_replicas": 0, "sampling": SAMPLING},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.timeout(1500)
def test_captions_of_a_real_language_model_go_through_every_stage(selma: Any, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = selma("run", recipe=recipe)
    assert finished.returncode == 0, finished.stderr[-3000:]
    generated = json.loads((run_dir / "done" / "generate.json").read_text())
    _check_questions(run_dir, generated["questions"])
    _check_images(run_dir, generated["images"])
    for skill in SKILLS:
        result = json.loads((run_dir / "experts" / skill / "result.json").read_text())
        assert (result["step"], result["examples"]) == (2, PER_SKILL - DEV)
        assert 0 <= result["dev_dsg"] <= 1
    search = json.loads((run_dir / "merged" / "merged" / "report.json").read_text())["search"]
    assert all(0 <= candidate["score"] <= 1 for candidate in search["candidates"])
    evaluated = json.loads((run_dir / "done" / "evaluate.json").read_text())
    assert set(evaluated["models"]) == {"base", *SKILLS, "merged"}
    assert evaluated["prompts"] == 2
    report = (run_dir / "report.html").read_text()
    assert f"{generated['questions']['prompts']} prompts" in report
    assert (run_dir / "served.png").read_bytes().startswith(b"\x89PNG")
    again = selma("generate", recipe=recipe)
    assert "finished before" in again.stdout


def _check_questions(run_dir: Path, counts: dict) -> None:
    """Every kept prompt was asked about once, and is counted as written or as judged by the question about the whole of it."""
    kept = len(SKILLS) * PER_SKILL
    assert (counts["source"], counts["prompts"]) == ("written", kept)
    assert counts["written"] + counts["failed"] == kept
    assert counts["whole"] == counts["failed"] == sum(counts["failures"].values())
    lines = [line for path in (run_dir / "questions").rglob("*.json") for line in json.loads(path.read_text())["lines"]]
    assert len({line["prompt"] for line in lines}) == len(lines) == kept
    assert sum("failure" in line for line in lines) == counts["failed"]
    assert all(question["category"] != WHOLE for line in lines for question in line.get("questions", []))


def _check_images(run_dir: Path, counts: dict) -> None:
    """Of each training prompt one image was chosen and one was not, each with the judge's score where it could be read."""
    rows = [row for path in (run_dir / "images").rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    prompts = len(SKILLS) * (PER_SKILL - DEV)
    assert (counts["rendered"], counts["rejected"], counts["failed"]) == (prompts, prompts, 0)
    assert len({row["id"] for row in rows}) == len(rows) == prompts * PER_PROMPT
    assert not list((run_dir / "candidates").rglob("*.parquet"))
    by_prompt: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        by_prompt.setdefault((row["skill"], row["prompt"]), []).append(row)
    for images in by_prompt.values():
        best = max(images, key=lambda row: row["score"] or 0.0)
        (chosen,) = [row for row in images if row["split"] == "train"]
        assert (chosen["score"] or 0.0) == (best["score"] or 0.0)
        assert all(row["score"] is None or 0 <= row["score"] <= 1 for row in images)
