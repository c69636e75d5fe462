"""Ground truth in the place of the LLM's prompts or the model's images: SELMA's ablations (section 5.4), which the miniature can draw."""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from selma_ray.errors import CaptionError, ConfigError
from selma_ray.images.config import ImagesConfig
from selma_ray.images.shards import write_shards
from selma_ray.miniature import world
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.splits import split_of
from selma_ray.prompts.store import PromptCandidate, read_decided, write_decided
from selma_ray.records import IMAGE_SCHEMA, content_id, seed_of
from selma_ray.storage import RunFolder

__all__ = ["draw_images", "write_captions"]

_MODEL = "ground_truth"


def write_captions(
    folder: RunFolder, skills: Sequence[str], config: PromptsConfig, seed: int, excluded: Collection[str] = ()
) -> None:
    """Keep captions of the miniature's own scenes as each skill's prompts, as if one answer of the LLM had held them all.

    None is in `excluded`, none is kept twice. Raises ConfigError for a skill that is not the miniature's, or too many captions.
    """
    unknown = sorted(set(skills) - set(world.SKILLS))
    if unknown:
        raise ConfigError(
            f"data.prompts ground_truth needs skills of the miniature ({', '.join(world.SKILLS)}), got {unknown[0]}; take llm"
        )
    seen = {world.normalise_caption(prompt) for prompt in excluded}
    for skill in skills:
        captions = _captions(skill, config.per_skill, seed, seen)
        if read_decided(folder, skill, 0) is None:
            kept = [
                PromptCandidate(text, index=index, split=split_of(index, config)) for index, text in enumerate(captions)
            ]
            write_decided(folder, skill, 0, kept)


def draw_images(
    folder: RunFolder, prompts: Iterable[Mapping[str, Any]], config: ImagesConfig, seed: int
) -> Iterator[Mapping[str, Any]]:
    """Draw each training prompt's scene `config.per_prompt` times, write the images of each prompt, and yield the prompt.

    Takes rows of PROMPT_SCHEMA. Raises ConfigError for a prompt that says no scene of the miniature.
    """
    for prompt in prompts:
        if prompt["split"] != "train":
            continue
        rows = [_drawn(prompt, index, seed) for index in range(config.per_prompt)]
        write_shards(folder, pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA))
        yield prompt


def _captions(skill: str, count: int, seed: int, seen: set[str]) -> list[str]:
    captions = world.sample_captions(skill, count, seed_of(seed, captions=skill), seen)
    if len(captions) < count:
        raise ConfigError(
            f"prompts.per_skill must be at most the captions that {skill} has ({len(captions)} were found), got {count}; lower it"
        )
    return captions


def _drawn(prompt: Mapping[str, Any], index: int, seed: int) -> dict[str, Any]:
    identity = {"skill": prompt["skill"], "prompt": prompt["prompt"], "image_index": index}
    image_seed = seed_of(seed, **identity)
    try:
        image = world.draw_caption(prompt["prompt"], image_seed)
    except CaptionError as error:
        raise ConfigError(f"data.images ground_truth needs captions of the miniature ({error}); take model") from None
    row_id = content_id(**identity, seed=image_seed, model=_MODEL)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {
        "id": row_id, **identity, "split": prompt["split"], "seed": image_seed,
        "image": {"bytes": buffer.getvalue(), "path": f"{row_id}.png"}, "model": _MODEL, "revision": "", "scheduler": "", "steps": 0,
        "guidance_scale": 0.0, "width": image.width, "height": image.height, "error": None,
    }  # fmt: skip
