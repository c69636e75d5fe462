"""The real commands as subprocesses, on a recipe small enough for a test."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "jobs" / "recipes" / "demo.yaml"

# The demo with every engine real and every count small.
SMALL = [
    "skills=[miniature/common, miniature/counting]",
    "prompts.per_skill=8",
    "prompts.per_request=4",
    "prompts.requests_in_flight=2",
    "prompts.dev_fraction=0.1",
    "images.sampling.steps=3",
    "experts.steps=6",
    "experts.checkpoint_every_steps=2",
    "experts.lora={rank: 4, alpha: 4}",
    "evaluation.max_prompts=4",
    "evaluation.sampling.steps=3",
    "serving.port=0",
    "serving.sampling.steps=3",
]


@pytest.fixture
def selma() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `selma COMMAND RECIPE OVERRIDES…` and hands back its output."""

    def run(
        command: str, *overrides: str, recipe: Path | str = DEMO, timeout_s: float = 900
    ) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "selma_ray.cli", command, str(recipe), *overrides]
        return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s)

    return run
