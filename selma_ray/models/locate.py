"""From the name of a model in a recipe to a folder that can be loaded, and a revision that content ids can name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from selma_ray.errors import ModelNotFoundError
from selma_ray.local_copies import local_copy
from selma_ray.miniature.locate import detector_dir, judge_dir, llm_dir, text_to_image_dir, weak_text_to_image_dir
from selma_ray.models.fingerprint import fingerprint

__all__ = ["MINIATURE", "LocatedModel", "locate_judge", "locate_llm", "locate_part", "locate_text_to_image"]

MINIATURE = "miniature"
MINIATURE_WEAK = "miniature-weak"
MINIATURE_DETECTOR = "miniature-detector"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LocatedModel:
    """A loadable model: `path` is a local folder or a hub name, `revision` names its exact content."""

    path: str
    revision: str


def locate_text_to_image(name: str, revision: str | None = None) -> LocatedModel:
    """Locate a text-to-image pipeline; raises ModelNotFoundError where a folder is missing or is no pipeline."""
    shipped = {MINIATURE: text_to_image_dir, MINIATURE_WEAK: weak_text_to_image_dir}
    return _locate(name, revision, shipped, required_file="model_index.json")


def locate_llm(name: str, revision: str | None = None) -> LocatedModel:
    """Locate a language model; raises ModelNotFoundError where a folder is missing or holds no model."""
    return _locate(name, revision, {MINIATURE: llm_dir}, required_file="config.json")


def locate_judge(name: str, revision: str | None = None) -> LocatedModel:
    """Locate a judge; raises ModelNotFoundError where a folder is missing or holds no model."""
    shipped = {MINIATURE: judge_dir, MINIATURE_DETECTOR: detector_dir}
    return _locate(name, revision, shipped, required_file="config.json")


def locate_part(key: str, name: str) -> LocatedModel:
    """Locate a part of a pipeline that stands for itself; raises ModelNotFoundError where a folder is missing or holds none."""
    try:
        return _locate(name, None, {}, required_file="config.json")
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{key}: {error}") from None


def _locate(
    name: str, revision: str | None, shipped: Mapping[str, Callable[[], Path]], required_file: str
) -> LocatedModel:
    if name in shipped:
        folder = shipped[name]()
        return LocatedModel(str(folder), fingerprint(folder))
    folder = local_copy(name) if "://" in name else Path(name).expanduser().absolute()
    if folder.is_dir():
        if not (folder / required_file).is_file():
            raise ModelNotFoundError(
                f"model folder {name} must hold {required_file}; name the folder that save_pretrained wrote"
            )
        return LocatedModel(str(folder), fingerprint(folder))
    if name.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFoundError(
            f"model folder {name} does not exist; give {' or '.join(['a folder', 'a hub name (owner/model)', *shipped])}"
        )
    return LocatedModel(name, revision or "main")
