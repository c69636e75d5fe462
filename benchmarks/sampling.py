"""What cheaper sampling costs: time and DSG of fewer steps, another scheduler and step caching, on the miniature's held-out captions.

Run: python -m benchmarks.sampling [prompts=60]
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.common import machine, print_result, print_table, read_settings
from selma_ray.evaluation.statistics import paired_difference
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.judging.scoring import score_images
from selma_ray.judging.suites import open_suite
from selma_ray.models.config import ModelConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.schedulers import use_scheduler
from selma_ray.serving.batch import StepBatch
from selma_ray.serving.denoiser import denoiser_for
from selma_ray.serving.engine import Engine
from selma_ray.serving.requests import ImageRequest

BATCH = 8
GUIDANCE = 2.0
SIZE_PX = (64, 64)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Way:
    """A way of sampling, by the keys of a recipe's `serving` section."""

    steps: int
    scheduler: str | None = None
    cache_interval: int = 1

    @property
    def name(self) -> str:
        """Return the way in a table's words."""
        parts = [f"{self.steps} steps", self.scheduler or "the model's scheduler"]
        return ", ".join(parts + ([f"cache_interval {self.cache_interval}"] if self.cache_interval > 1 else []))


REFERENCE = Way(20)
WAYS = (
    REFERENCE, Way(20, cache_interval=2), Way(20, cache_interval=3), Way(10), Way(10, "UniPCMultistepScheduler"),
    Way(10, "DPMSolverMultistepScheduler"), Way(10, "UniPCMultistepScheduler", 2), Way(6, "UniPCMultistepScheduler"),
)  # fmt: skip


def main() -> None:
    """Draw and judge the same prompts from the same seeds in every way; print the table and one JSON line."""
    options = read_settings({"prompts": 60})
    print(machine())
    torch.set_num_threads(1)
    suite = open_suite("miniature", options["prompts"])
    judge = open_judge(JudgeConfig())
    rows, result = [], {}
    reference_s, reference_dsg = 0.0, np.zeros(0)
    for way in WAYS:
        seconds, images = _draw(way, suite)
        judged = score_images(judge, images, [prompt.questions for prompt in suite])
        dsg = np.array([each.score or 0.0 for each in judged])
        if way == REFERENCE:
            reference_s, reference_dsg = seconds, dsg
        ones = np.ones(len(dsg))
        difference = paired_difference(dsg, ones, reference_dsg, ones, RESAMPLES, seed=0)
        assert difference is not None
        rows.append(
            (
                way.name, f"{len(suite) / seconds:.2f}", f"{reference_s / seconds:.2f}", f"{100 * dsg.mean():.1f}",
                f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]",
            )
        )  # fmt: skip
        result[way.name] = [round(reference_s / seconds, 2), round(100 * difference.mean, 1)]
    print_table(("sampling", "images/s", "times as fast", "DSG in percent", "difference [95% interval]"), rows)
    print_result(result)


def _draw(way: Way, suite: Sequence[PromptWithQuestions]) -> tuple[float, list[Image.Image]]:
    """Return the seconds and the images of the suite's prompts, each from its index as seed."""
    pipeline = load_pipeline(ModelConfig(), "cpu")
    use_scheduler(pipeline, way.scheduler)
    batch = StepBatch(denoiser_for(pipeline, cache_interval=way.cache_interval), BATCH, SIZE_PX)
    started_s = time.monotonic()
    engine = Engine(batch, len(suite))
    drawn = engine.submit(
        [ImageRequest(prompt.prompt, seed, way.steps, GUIDANCE, *SIZE_PX) for seed, prompt in enumerate(suite)]
    )
    images = [each.result() for each in drawn]
    engine.close()
    return time.monotonic() - started_s, images


if __name__ == "__main__":
    main()
