"""What a run does, counted where it happens, on Ray's own Prometheus endpoint: `ray_selma_…`, with the run and the stage as tags."""

from typing import Any

__all__ = ["COUNTERS", "count"]

COUNTERS = {
    "selma_prompts_kept": ("Prompts kept", ()),
    "selma_prompts_rejected": ("Candidates that were not kept", ("reason",)),
    "selma_images_rendered": ("Images rendered, those that a selection did not choose among them", ()),
    "selma_images_rejected": ("Images that a selection did not choose", ()),
    "selma_images_failed": ("Images that could not be rendered", ()),
    "selma_render_seconds": ("Time that renderers spent on images: its rate over their number is the share that they are busy", ()),
    "selma_images_scored": ("Images that a judge scored", ()),
    "selma_questions_answered": ("Questions about images that a judge was asked", ()),
    "selma_training_steps": ("Optimiser steps", ("expert",)),
}  # fmt: skip
"""What is counted, by name: the description and the tags beside `run` and `stage`."""

_made: dict[str, Any] = {}


def count(name: str, amount: float, run: str, stage: str, **tags: str) -> None:
    """Add to a counter; does nothing in a process that is not part of a Ray cluster, or for an amount of 0."""
    import ray

    if amount <= 0 or not ray.is_initialized():
        return
    if name not in _made:
        from ray.util.metrics import Counter

        description, further = COUNTERS[name]
        _made[name] = Counter(name, description, tag_keys=("run", "stage", *further))
    _made[name].inc(amount, tags={"run": run, "stage": stage, **tags})
