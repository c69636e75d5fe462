"""A run's folder whose captions and images are the miniature's own, so that training can be measured without generating first."""

from collections.abc import Sequence

from selma_ray.images.config import ImagesConfig
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.store import read_prompts
from selma_ray.run.ground_truth import draw_images, write_captions
from selma_ray.storage import RunFolder

__all__ = ["draw_run"]


def draw_run(path: str, skills: Sequence[str], images_per_skill: int) -> RunFolder:
    """Write `images_per_skill` captions and images of each skill into a new run folder."""
    folder = RunFolder(path)
    prompts = PromptsConfig(per_skill=images_per_skill, dev_fraction=0)
    write_captions(folder, skills, prompts, seed=0)
    for skill in skills:
        for _ in draw_images(folder, read_prompts(folder, skill).to_pylist(), ImagesConfig(), seed=0):
            pass
    return folder
