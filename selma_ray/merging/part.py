"""Merging one part of a pipeline, the denoiser or a text encoder: module by module, into an adapter's folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from selma_ray.adapters.deltas import Delta, DenseDelta, truncated
from selma_ray.adapters.peft_format import Adapter, LoraFactors, Shape, open_adapter, shapes_of, write_adapter
from selma_ray.adapters.text_encoders import text_parts
from selma_ray.merging.bake import PartDeltas
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.methods import DENSE_METHODS, METHODS, MergeOptions
from selma_ray.merging.regmean import InputStatistics
from selma_ray.merging.report import MergeReport
from selma_ray.merging.weights import Weights, weights_of
from selma_ray.models.parts import DTYPES

__all__ = ["MergedPart", "adapter_rank", "low_rank", "merge_part", "merger", "summed_rank", "text_encoder_adapters"]


@dataclass(frozen=True)
class MergedPart:
    """What came of merging one part."""

    adapter: Adapter
    shapes: Mapping[str, Shape]
    baked: Callable[[str], Delta]
    """What is added to a module's weight: the adapter's delta, or the merge itself where that is no low-rank one."""
    report: MergeReport

    @property
    def deltas(self) -> PartDeltas:
        """Return what a pipeline is baked with."""
        return self.shapes, self.baked


def text_encoder_adapters(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Adapter]]:
    """Return, for each text encoder that one of several adapters changes, the part of each; of those that do not, one without modules."""
    by_part: dict[str, dict[str, Adapter]] = {}
    for part in sorted({part for adapter in adapters.values() for part in text_parts(adapter.folder)}):
        by_part[part] = {
            name: open_adapter(adapter.folder / part)
            if part in text_parts(adapter.folder)
            else Adapter(adapter.folder / part, adapter.base_model, {}, {}, {})
            for name, adapter in adapters.items()
        }
    return by_part


def merge_part(
    target: Path,
    adapters: Mapping[str, Adapter],
    weights: Weights,
    config: MergingConfig,
    seed: int,
    model_name: str,
    inputs: InputStatistics | None = None,
) -> MergedPart:
    """Merge the same part of several adapters into the adapter's folder `target`; raises AdapterError where they do not fit together."""
    experts = list(adapters.values())
    shapes = shapes_of(experts, alike=not config.experts)
    cut_rank = config.rank or max(expert.rank for expert in experts)
    options = MergeOptions(config.scale, cut_rank, config.density, seed, model_name, inputs)
    merged = merger(adapters, shapes, weights, config.method, options)
    exact = merger(adapters, shapes, weights, "average_deltas", options) if config.method == "svd" else None
    report = MergeReport(list(adapters), cut_rank)
    rank = adapter_rank(experts, shapes, cut_rank, config.method)

    def measured(module: str) -> LoraFactors:
        result = merged(module)
        own = [expert.factors_or_zero(module, shapes[module]) for expert in experts]
        report.add(own, exact(module) if exact else result)
        return low_rank(result, rank)

    dtype, base = DTYPES[config.adapter_dtype], experts[0]
    write_adapter(target, map(measured, shapes), shapes, rank, base.base_model, base.revision, dtype)
    adapter = open_adapter(target)
    # What is low-rank stands in an adapter of full precision, exactly; anything else is made again.
    exact_adapter = config.method not in DENSE_METHODS and dtype == torch.float32
    return MergedPart(adapter, shapes, adapter.factors if exact_adapter else merged, report)


def merger(
    adapters: Mapping[str, Adapter], shapes: Mapping[str, Shape], weights: Weights, method: str, options: MergeOptions
) -> Callable[[str], Delta]:
    """Return what merges a module of several adapters."""
    merge, names = METHODS[method], list(adapters)
    return lambda module: merge(
        [adapter.factors_or_zero(module, shapes[module]) for adapter in adapters.values()],
        weights_of(module, weights, names),
        options,
    )


def low_rank(delta: Delta, rank: int) -> LoraFactors:
    """Return a delta's factors: its own, or of a dense one the nearest of `rank`."""
    return truncated(delta, rank) if isinstance(delta, DenseDelta) else delta


def summed_rank(experts: Sequence[Adapter], shapes: Mapping[str, Shape]) -> int:
    """Return the largest rank of a module's factors one above the other."""
    return max(sum(expert.ranks.get(module, 1) for expert in experts) for module in shapes)


def adapter_rank(experts: Sequence[Adapter], shapes: Mapping[str, Shape], cut_rank: int, method: str) -> int:
    """Return the rank of the adapter that stands for a merge by `method`."""
    if method == "svd" or method in DENSE_METHODS:
        return cut_rank
    return experts[0].rank if method == "average_factors" else summed_rank(experts, shapes)
