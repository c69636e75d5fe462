"""What an experiment of a study took beside what it gave: time, and images drawn while it trained."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from selma_ray.experts.plan import plan_experts
from selma_ray.run.opening import Run
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder

__all__ = ["cost_rows", "images_drawn", "timed"]

_FILE = "cost.json"


@contextmanager
def timed(run: Run) -> Iterator[None]:
    """Add the time that the block takes to what the experiment took in earlier starts."""
    started_s = time.monotonic()
    before = run.folder.read_json(_FILE)["seconds"] if run.folder.exists(_FILE) else 0.0
    try:
        yield
    finally:
        seconds = before + time.monotonic() - started_s
        run.folder.write_json({"seconds": round(seconds, 1), "images": images_drawn(run.recipe)}, _FILE)


def images_drawn(recipe: Recipe) -> int:
    """Return how many images a run draws while it trains: in the rounds of its experts, and for a student."""
    names = [str(number) for number in range(len(recipe.skills))]
    planned = [each.config.nft for each in plan_experts(names, recipe.experts)]
    rounds = sum(nft.rounds * nft.prompts_per_round * nft.images_per_prompt for nft in planned if nft)
    distil = recipe.merging.distil
    student = distil.steps * distil.prompts_per_skill * len(names) if recipe.merging.method == "distil" else 0
    return rounds + student


def cost_rows(folders: Mapping[str, Sequence[RunFolder]]) -> list[dict[str, Any]]:
    """Return the minutes and the images of each experiment by its title, means over the seeds that are made."""
    rows = []
    for title, of_arm in folders.items():
        costs = [folder.read_json(_FILE) for folder in of_arm if folder.exists(_FILE)]
        if costs:
            rows.append(
                {
                    "title": title,
                    "minutes": fmean(cost["seconds"] for cost in costs) / 60,
                    "images": round(fmean(cost["images"] for cost in costs)),
                }
            )
    return rows
