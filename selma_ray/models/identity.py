"""What decides the images of a text-to-image model: one identity for image ids, caches, merges and evaluations."""

from pathlib import Path

from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image

__all__ = ["model_identity"]


def model_identity(model: ModelConfig) -> dict[str, str | None]:
    """Return the hash of a model's files (of a hub model its name and revision), its precision and its variant.

    Raises ModelNotFoundError where it cannot be located.
    """
    located = locate_text_to_image(model.name, model.revision)
    is_local = Path(located.path).is_dir()
    content = {"files": located.revision} if is_local else {"name": located.path, "revision": located.revision}
    return {**content, "dtype": model.dtype, "variant": model.variant}
