"""The experts of a service, read from their adapter folders."""

from collections.abc import Mapping

from selma_ray.adapters.mixing import Expert, LowRank

__all__ = ["open_experts"]


def open_experts(folders: Mapping[str, str]) -> dict[str, Expert]:
    """Read experts from adapter folders, by name; called on the replica that mixes them. Raises AdapterError."""
    from selma_ray.adapters.peft_format import open_adapter

    return {
        name: {factors.module: LowRank(factors.A_RI, factors.scale * factors.B_OR) for factors in open_adapter(folder)}
        for name, folder in folders.items()
    }
