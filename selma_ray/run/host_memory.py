"""Whether the nodes' memory holds the weights of a service without GPUs."""

from selma_ray.errors import ConfigError
from selma_ray.run.memory import pipeline_weights
from selma_ray.run.recipe import Recipe
from selma_ray.run.served_weights import hosted_recipes

__all__ = ["check_host", "host_weights"]

_BYTES = {"fp32": 4, "auto": 4, "bf16": 2, "fp16": 2}
_GB = 1e9


def host_weights(recipe: Recipe) -> float:
    """Return the bytes of weights that the generators of a service hold in the host's memory, where they have no GPUs."""
    serving = recipe.serving
    if serving.num_gpus:
        return 0.0
    total = 0.0
    for each in (recipe, *hosted_recipes(serving).values()):
        weights, width = pipeline_weights(each.model), _BYTES[each.model.dtype]
        denoisers = sum(weights.get(name, 0) for name in ("unet", "transformer")) if serving.experts else 0
        total += serving.generator_replicas * width * (sum(weights.values()) + denoisers)
    return total


def check_host(recipe: Recipe, memory_bytes: float) -> None:
    """Raise ConfigError where the weights of a service without GPUs alone are more than the nodes' memory."""
    needed = host_weights(recipe)
    if needed > memory_bytes:
        runs = 1 + len(recipe.serving.models)
        raise ConfigError(
            f"serve: the weights of {runs * recipe.serving.generator_replicas} generators take {needed / _GB:.1f} GB of memory, and there "
            f"are {memory_bytes / _GB:.1f}; leave runs out of serving.models, set serving.experts=false, or add nodes"
        )
