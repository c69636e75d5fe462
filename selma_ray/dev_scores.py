"""Scores of an expert's adapter on dev prompts: rendering and judging, put together for the stage that fits experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean

from selma_ray.errors import CaptionError, ConfigError, RenderError
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.questions import PromptWithQuestions, questions_for_prompt
from selma_ray.evaluation.suites import open_suite
from selma_ray.models.config import ModelConfig
from selma_ray.prompts.store import read_prompts
from selma_ray.records import seed_of
from selma_ray.storage import RunFolder

__all__ = ["DevScorer", "dev_prompts"]


def dev_prompts(
    folder: RunFolder, skills: Sequence[str], suite_name: str | None, section: str
) -> dict[str, list[PromptWithQuestions]]:
    """Return each skill's dev prompts with their questions: those of a suite, or those the run kept.

    Raises ConfigError for a skill that has none; `section` is the part of the recipe that asks for them.
    """
    if suite_name:
        suite = open_suite(suite_name)
        prompts = {skill: [prompt for prompt in suite if prompt.skill == skill] for skill in skills}
        remedy = f"add some to {section}.suite {suite_name}"
    else:
        prompts = {skill: _kept_prompts(folder, skill, section) for skill in skills}
        remedy = f"raise prompts.dev_fraction, or leave {section} out"
    for skill, of_skill in prompts.items():
        if not of_skill:
            raise ConfigError(f"{section} needs dev prompts of every skill, {skill} has none; {remedy}")
    return prompts


def _kept_prompts(folder: RunFolder, skill: str, section: str) -> list[PromptWithQuestions]:
    rows = read_prompts(folder, skill, "dev").to_pylist()
    try:
        return [
            PromptWithQuestions(row["id"], skill, row["prompt"], questions_for_prompt(row["prompt"])) for row in rows
        ]
    except CaptionError as error:
        raise ConfigError(
            f"{section}: a dev prompt of {skill} has no questions ({error}); name {section}.suite"
        ) from None


@dataclass(frozen=True)
class DevScorer:
    """Scores adapters as the evaluation does, on dev prompts: same sampling, same judge, one seed for each prompt."""

    model: ModelConfig
    evaluation: EvaluationConfig
    prompts: Mapping[str, Sequence[PromptWithQuestions]]
    max_prompts: int | None
    seed: int

    def __call__(self, adapter_dir: str, skills: Sequence[str]) -> dict[str, float]:
        """Return the mean DSG score `dsg` in [0, 1] and the number of `images` it is the mean of."""
        import torch

        from selma_ray.evaluation.judges.opening import open_judge
        from selma_ray.evaluation.scoring import score_images
        from selma_ray.models.rendering import Renderer, load_pipeline

        torch.set_num_threads(max(1, int(self.evaluation.num_cpus)))
        prompts = self._prompts_of(skills)
        renderer = Renderer(load_pipeline(self.model, Path(adapter_dir)), self.evaluation.sampling)
        judge = open_judge(self.evaluation.judge)
        scores: list[float] = []
        for start in range(0, len(prompts), self.evaluation.batch_size):
            batch = prompts[start : start + self.evaluation.batch_size]
            seeds = [seed_of(self.seed, prompt=prompt.prompt, split="dev") for prompt in batch]
            images = renderer.render([prompt.prompt for prompt in batch], seeds)
            questions = [prompt.questions for prompt in batch]
            judged = score_images(judge, images, questions, self.evaluation.dsg_scorer)
            scores += [each.score for each in judged if each.score is not None]
        if not scores:
            raise RenderError(f"no dev image of {adapter_dir} could be judged; look at evaluation.judge")
        return {"dsg": fmean(scores), "images": len(scores)}

    def _prompts_of(self, skills: Sequence[str]) -> list[PromptWithQuestions]:
        """Return the dev prompts of several skills in turn, cut to the most that are rendered."""
        in_turn = chain.from_iterable(zip_longest(*(self.prompts[skill] for skill in skills)))
        return [prompt for prompt in in_turn if prompt is not None][: self.max_prompts]
