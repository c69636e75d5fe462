"""A run of the miniature whose experts are random adapters, as if it had been trained."""

import json
from pathlib import Path
from typing import Any

from selma_ray.miniature.locate import text_to_image_dir
from selma_ray.run.ground_truth import write_captions
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import load_recipe
from tests.unit.adapters.adapters_on_disk import save_random_adapter

__all__ = ["trained_run"]

_DEMO = Path(__file__).parents[2] / "jobs" / "recipes" / "demo.yaml"
_OVERRIDES = (
    "skills=[miniature/common, miniature/counting]",
    "prompts.per_skill=8",
    "prompts.dev_fraction=0.25",
    "prompts.llm.engine=free",
    "evaluation.sampling.steps=2",
)


def trained_run(folder: Path, *overrides: str) -> Any:
    """Return a run of two skills, with its captions, that has everything up to merging but the images."""
    run = open_run(load_recipe(_DEMO, [f"run_dir={folder}", *_OVERRIDES, *overrides]))
    write_captions(run.folder, run.skill_names, run.recipe.prompts, run.recipe.seed)
    for seed, skill in enumerate(run.skill_names):
        save_random_adapter(text_to_image_dir(), folder / "experts" / skill, seed, rank=2, lora_alpha=1)
        path = folder / "experts" / skill / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "miniature"}))
    for stage in ("generate", "train"):
        run.folder.mark_done(stage, {})
    return run
