"""What a service loads beside its own run: the runs of serving.models, and the weights of serving.adapters."""

import math
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selma_ray.adapters.files import WEIGHTS_FILE, local_adapter
from selma_ray.errors import SelmaError
from selma_ray.run.opening import open_run
from selma_ray.run.recipe import Recipe
from selma_ray.serving.config import ServingConfig

__all__ = ["adapter_parameters", "hosted_recipes"]


def hosted_recipes(serving: ServingConfig) -> dict[str, Recipe]:
    """Return the recipes of the runs that serving.models names; raises ConfigError for a folder that is none."""
    return {name: open_run(folder).recipe for name, folder in serving.models.items()}


@lru_cache
def adapter_parameters(place: str) -> int:
    """Return the number of weights in a LoRA's file or folder, by its header alone; 0 for one that cannot be read, refused elsewhere."""
    try:
        path = local_adapter(Path(place).expanduser() if "://" not in place else place)
        with safe_open(path / WEIGHTS_FILE if path.is_dir() else path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError, SelmaError):
        return 0
