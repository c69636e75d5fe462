"""What decides the images of a text-to-image model: one identity for image ids, caches, merges and evaluations."""

from pathlib import Path
from typing import Any

from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import LocatedModel, locate_part, locate_text_to_image

__all__ = ["model_identity"]


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """Return the hash of a model's files (of a hub model its name and revision), its precision, its variant, and how it reads and decodes.

    Raises ModelNotFoundError where it cannot be located.
    """
    content = _content(locate_text_to_image(model.name, model.revision))
    further: dict[str, Any] = {"vae_tiling": True} if model.vae_tiling else {}
    if model.text_chunks != 1:
        further["text_chunks"] = model.text_chunks
    if model.vae is not None:
        further["vae"] = _content(locate_part("model.vae", model.vae))
    return {**content, "dtype": model.dtype, "variant": model.variant, **further}


def _content(located: LocatedModel) -> dict[str, str]:
    if Path(located.path).is_dir():
        return {"files": located.revision}
    return {"name": located.path, "revision": located.revision}
