"""What the ways beyond one round of SELMA draw and learn beside its training images: rounds of NFT experts, and a distilled student."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selma_ray.experts.config import ExpertsConfig
from selma_ray.merging.config import DistilConfig
from selma_ray.models.config import SamplingConfig

if TYPE_CHECKING:  # what it needs loads torch, which the command line does not
    from selma_ray.models.cost import TrainingCost

__all__ = ["Work", "distilled", "drawn_in_rounds", "render_flops"]


@dataclass(frozen=True)
class Work:
    """Images that are drawn on the way, adapters that are kept for it, and the FLOPs of both drawing and what only this way takes."""

    images: int = 0
    adapters: float = 0
    """In adapters of the first expert's rank."""
    flops: float = 0


def drawn_in_rounds(experts: Sequence[ExpertsConfig], cost: "TrainingCost", sampling: SamplingConfig) -> Work:
    """Return what the rounds of `experts.nft` draw and keep: every image, and the adapter that drew each round's."""
    images, adapters, flops = 0, 0.0, 0.0
    for expert in experts:
        if (nft := expert.nft) is None:
            continue
        drawn = nft.rounds * nft.prompts_per_round * nft.images_per_prompt
        changes = {"guidance_scale": nft.guidance_scale, "steps": nft.sampling_steps or sampling.steps}
        images += drawn
        adapters += nft.rounds * expert.lora.rank / experts[0].lora.rank
        flops += drawn * render_flops(cost, sampling.model_copy(update=changes))
    return Work(images, adapters, flops)


def distilled(config: DistilConfig, num_skills: int, cost: "TrainingCost", sampling: SamplingConfig) -> Work:
    """Return what a student's steps take: images of its own, and on states of each its loss and the predictions of its teachers."""
    images = config.steps * num_skills * config.prompts_per_skill
    steps = config.sampling_steps or sampling.steps
    own = cost.predictions(config.guidance_scale)
    teacher_scale = config.teacher_guidance_scale
    teachers = own if teacher_scale is None else cost.predictions(teacher_scale)
    if config.anchor:
        teachers += own
    of_state = own * cost.step_flops + teachers * cost.forward_flops
    drawing = sampling.model_copy(update={"guidance_scale": config.guidance_scale, "steps": steps})
    of_image = render_flops(cost, drawing) + min(steps, config.states_per_image) * of_state
    return Work(images, flops=images * of_image)


def render_flops(cost: "TrainingCost", sampling: SamplingConfig) -> float:
    """Return the FLOPs of one image's denoising steps."""
    return cost.forward_flops * sampling.steps * cost.predictions(sampling.guidance_scale)
