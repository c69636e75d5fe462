"""Scores of adapters on dev prompts: rendering and judging, put together for the choice of checkpoints and of merge weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from statistics import fmean

from PIL import Image

from selma_ray.errors import RenderError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import seed_of

__all__ = ["DevScorer"]

_SHOWN = 4  # sample images of a checkpoint


@dataclass(frozen=True)
class DevScorer:
    """Scores adapters as the evaluation does, on dev prompts: same sampling, same judge, one seed for each prompt."""

    model: ModelConfig
    sampling: SamplingConfig
    judge: JudgeConfig
    dsg_scorer: str
    """One of DSG's scorers: official, dpg or selma."""
    prompts: Mapping[str, Sequence[PromptWithQuestions]]
    """Dev prompts by skill."""
    max_prompts: int | None
    """Prompts rendered for a score; None for all."""
    seed: int
    batch_size: int = 16
    num_cpus: float = 1
    num_gpus: float = 0
    """GPUs of rendering; the judge has its own."""
    num_gpus_key: str = "evaluation.num_gpus"
    """The recipe's key that says so."""

    def __call__(
        self, adapter_dir: str, skills: Sequence[str], show: Callable[[Mapping[str, Image.Image]], None] | None = None
    ) -> dict[str, float]:
        """Return the mean DSG score `dsg` in [0, 1] and the number of `images` it is the mean of.

        `show` is given the first images by their prompts.
        """
        import torch

        from selma_ray.adapters.applying import load_adapted_pipeline
        from selma_ray.judging.judges.opening import open_judge
        from selma_ray.judging.scoring import score_images
        from selma_ray.models.device import device_of
        from selma_ray.models.rendering import Renderer

        torch.set_num_threads(max(1, int(self.num_cpus)))
        prompts = self._prompts_of(skills)
        device = device_of(self.num_gpus, self.num_gpus_key)
        renderer = Renderer(load_adapted_pipeline(self.model, adapter_dir, device), self.sampling)
        judge = open_judge(self.judge)
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            seeds = [seed_of(self.seed, prompt=prompt.prompt, split="dev") for prompt in batch]
            images = renderer.render([prompt.prompt for prompt in batch], seeds)
            if show and start == 0:
                texts = [prompt.prompt for prompt in batch]
                show(dict(zip(texts[:_SHOWN], images[:_SHOWN], strict=True)))
            questions = [prompt.questions for prompt in batch]
            judged = score_images(judge, images, questions, self.dsg_scorer)
            scores += [each.score for each in judged if each.score is not None]
        if not scores:
            raise RenderError(f"no dev image of {adapter_dir} could be judged; look at evaluation.judge")
        return {"dsg": fmean(scores), "images": len(scores)}

    def _prompts_of(self, skills: Sequence[str]) -> list[PromptWithQuestions]:
        """Return the dev prompts of several skills in turn, cut to the most that are rendered."""
        in_turn = chain.from_iterable(zip_longest(*(self.prompts[skill] for skill in skills)))
        return [prompt for prompt in in_turn if prompt is not None][: self.max_prompts]
