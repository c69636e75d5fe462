"""Runs on the miniature whose prompts are captions of its own, without a language model."""

from pathlib import Path
from typing import Any

from selma_ray.config import validate
from selma_ray.run.ground_truth import write_captions
from selma_ray.run.opening import Run
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder

__all__ = ["run_with_captions"]


def run_with_captions(folder: Path, skills: list[str], *, per_skill: int, dev_fraction: float, **recipe: Any) -> Run:
    """Return a run whose prompts are kept: `per_skill` captions of the miniature for each of its skills."""
    whole = {
        "run_dir": str(folder), "skills": [f"miniature/{skill}" for skill in skills],
        "prompts": {"per_skill": per_skill, "dev_fraction": dev_fraction}, **recipe,
    }  # fmt: skip
    run = Run(validate(Recipe, whole, "test"), RunFolder(str(folder)))
    write_captions(run.folder, run.skill_names, run.recipe.prompts, run.recipe.seed)
    return run
