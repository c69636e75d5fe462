"""Stage: the experts of a run become one model, `merged/<name>/` with an adapter, a baked pipeline, exports and a report."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selma_ray.adapters.deltas import Delta, truncated
from selma_ray.adapters.exports import write_export
from selma_ray.adapters.files import adapter_digest
from selma_ray.adapters.foreign import Adapted, described
from selma_ray.adapters.peft_format import Adapter, LoraFactors, Shape, open_adapter, shapes_of, write_adapter
from selma_ray.config import identity
from selma_ray.errors import AdapterError
from selma_ray.local_copies import whole_folder
from selma_ray.merging.bake import bake_pipeline, pipeline_folder
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.inputs import open_adapters, open_foreign
from selma_ray.merging.methods import MEANS, MergeOptions, default_weight, shares
from selma_ray.merging.part import adapter_rank, low_rank, merge_part, merger, summed_rank, text_encoder_adapters
from selma_ray.merging.regmean import InputStatistics
from selma_ray.merging.search import SearchResult
from selma_ray.merging.weights import ALL, Weights
from selma_ray.models.config import ModelConfig
from selma_ray.models.identity import model_identity
from selma_ray.models.parts import DTYPES
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["MergeSummary", "merge_adapters", "merge_experts", "start_of_student", "write_candidate"]

logger = logging.getLogger(__name__)

_REPORT_FILE = "report.json"


@dataclass(frozen=True)
class MergeSummary:
    """What was merged and how.

    `energy_kept` is what truncating the merge to `rank` keeps of it, `sign_conflicts` the share of entries on which experts disagree
    about the sign; `weights` are means over groups of blocks where those have their own.
    """

    name: str
    method: str
    scale: float
    weights: dict[str, float]
    modules: int
    rank: int
    energy_kept: float
    mean_cosine: float
    sign_conflicts: float

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values; `experts` lists the skills in order."""
        return {**asdict(self), "experts": list(self.weights)}


def merge_experts(
    folder: RunFolder,
    skills: Sequence[str],
    model: ModelConfig,
    config: MergingConfig,
    seed: int = 0,
    found: SearchResult | None = None,
    inputs: InputStatistics | None = None,
    student: str | None = None,
) -> MergeSummary:
    """Merge `experts/<skill>/` of a run into `merged/<name>/`: adapter/, pipeline/, report.json and the exports asked for.

    `found` is the search of `method: search`, whose best weights are merged, `inputs` what `method: regmean` needs, `student` the place of
    the adapter that `method: distil` has trained. The folder appears whole or not at all, and one that was made from the same experts in
    the same way is kept. Raises AdapterError where an expert is missing, unreadable, of another run, or does not fit the model.
    """
    assert (student is not None) == (config.method == "distil")
    adapters = {"student": open_adapter(student)} if student else open_adapters(folder, skills, model, config)
    skills = list(adapters)
    assert (found is not None) == (config.method == "search")
    weights = found.weights if found else {ALL: {"student": 1.0} if student else _weights(skills, model, config)}
    return _merge_into(folder, ("merged", config.name), adapters, weights, model, config, seed, found, inputs)


def merge_adapters(
    places: Mapping[str, str],
    model: ModelConfig,
    config: MergingConfig,
    target: Path,
    seed: int = 0,
    *,
    bake: bool = False,
) -> MergeSummary:
    """Merge LoRAs from anywhere, by name, into a folder: adapter/, report.json, the exports and, where asked to `bake`, pipeline/.

    The folder appears whole or not at all. Raises AdapterError where one cannot be merged, or where `target` holds something else.
    """
    if target.exists() and not (target / _REPORT_FILE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} must be a folder that is empty or holds a merge; name another")
    config = config.model_copy(update={"experts": dict(places)})
    with tempfile.TemporaryDirectory() as imported:
        adapters = open_foreign(places, Path(imported), model, config)
        weights = {ALL: _weights(list(places), model, config)}
        return _merge_into(RunFolder(str(target)), (), adapters, weights, model, config, seed, None, bake=bake)


def _merge_into(
    folder: RunFolder,
    place: Sequence[str],
    adapters: Mapping[str, Adapter],
    weights: Weights,
    model: ModelConfig,
    config: MergingConfig,
    seed: int,
    found: SearchResult | None,
    inputs: InputStatistics | None = None,
    *,
    bake: bool = True,
) -> MergeSummary:
    key = _content_key(adapters, weights, model, config, seed)
    before = folder.read_json(*place, _REPORT_FILE) if folder.exists(*place, _REPORT_FILE) else None
    if before and before["key"] == key and folder.exists(*place, "pipeline") >= bake:
        logger.info("%s holds this merge already", folder.path(*place))
        return _summary(before, config)
    with whole_folder(folder, *place, last=_REPORT_FILE) as part:
        report = _build(part, adapters, weights, model, config, seed, inputs, bake=bake)
        report |= {"key": key, "method": config.method, "scale": config.scale, "weights": _means(weights)}
        if found:
            report["search"] = {"weights": found.weights, **found.as_dict()}
        (part / _REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    return _summary(report, config)


def write_candidate(target: Path, adapters: Mapping[str, Adapter], weights: Weights, scale: float) -> None:
    """Write scale * sum_i w_i dW_i as a PEFT adapter folder, for a search to try."""
    experts = list(adapters.values())
    shapes = shapes_of(experts, alike=False)
    merged = merger(adapters, shapes, weights, "sum_deltas", MergeOptions(scale))
    rank = summed_rank(experts, shapes)
    write_adapter(
        target,
        (low_rank(merged(module), rank) for module in shapes),
        shapes,
        rank,
        experts[0].base_model,
        experts[0].revision,
    )


def start_of_student(
    adapters: Mapping[str, Adapter], model: ModelConfig, config: MergingConfig, seed: int
) -> tuple[list[LoraFactors], dict[str, Shape], int]:
    """Return the factors, the shapes and the rank of the merge that a student starts at."""
    distil = config.distil
    started = config.model_copy(update={"method": distil.start})
    experts = list(adapters.values())
    shapes = shapes_of(experts)
    cut_rank = distil.rank or config.rank or max(expert.rank for expert in experts)
    options = MergeOptions(config.scale, cut_rank, config.density, seed, model.name)
    merged = merger(adapters, shapes, {ALL: _weights(list(adapters), model, started)}, distil.start, options)
    rank = distil.rank or adapter_rank(experts, shapes, cut_rank, distil.start)
    return [_of_rank(merged(module), rank) for module in shapes], shapes, rank


def _of_rank(delta: Delta, rank: int) -> LoraFactors:
    """Return a delta in factors of at most a rank, exactly where it has no larger one."""
    if isinstance(delta, LoraFactors) and delta.rank <= rank:
        return delta
    return truncated(delta, rank)


def _build(
    part: Path,
    adapters: Mapping[str, Adapter],
    weights: Weights,
    model: ModelConfig,
    config: MergingConfig,
    seed: int,
    inputs: InputStatistics | None,
    *,
    bake: bool,
) -> dict[str, Any]:
    denoiser = merge_part(part / "adapter", adapters, weights, config, seed, model.name, inputs)
    encoders = {
        name: merge_part(part / "adapter" / name, of_part, weights, config, seed, model.name)
        for name, of_part in text_encoder_adapters(adapters).items()
    }
    if bake:
        changed = {name: encoder.deltas for name, encoder in encoders.items()}
        bake_pipeline(
            pipeline_folder(model), part / "pipeline", *denoiser.deltas, DTYPES[model.dtype], model.variant, changed
        )
    known = described(model)
    merge = {"merge_method": config.method, "merge_scale": f"{config.scale:g}", "merge_weights": json.dumps(weights)}
    _export(part, denoiser.adapter, known, config, merge)
    if config.export_experts:
        for name, expert in adapters.items():
            _export(part / "experts" / name, expert, known, config, {"skill": name})
    reports = {name: encoder.report.as_dict() for name, encoder in encoders.items()}
    return denoiser.report.as_dict() | ({"text_encoders": reports} if reports else {})


def _export(target: Path, adapter: Adapter, model: Adapted, config: MergingConfig, merge: Mapping[str, str]) -> None:
    metadata = {"base_model": adapter.base_model or "", "base_revision": adapter.revision or "", **merge}
    target.mkdir(parents=True, exist_ok=True)
    for name in config.exports:
        if not write_export(name, target, adapter, model, metadata, DTYPES[config.export_dtype]):
            logger.info("merging.exports: %s is not written for a %s", name, model.pipeline_class)


def _weights(skills: Sequence[str], model: ModelConfig, config: MergingConfig) -> dict[str, float]:
    if config.weights is None:
        return dict.fromkeys(skills, default_weight(config.method, len(skills), model.name))
    missing = set(skills) - set(config.weights)
    if missing:
        raise AdapterError(
            f"merging.weights must weigh every skill, {sorted(missing)[0]!r} is missing; add it or leave weights out"
        )
    weights = [config.weights[skill] for skill in skills]
    return dict(zip(skills, shares(weights) if config.method in MEANS else weights, strict=True))


def _means(weights: Weights) -> dict[str, float]:
    groups = list(weights.values())
    return {skill: sum(group[skill] for group in groups) / len(groups) for skill in groups[0]}


def _content_key(
    adapters: Mapping[str, Adapter], weights: Weights, model: ModelConfig, config: MergingConfig, seed: int
) -> str:
    return content_id(
        experts=[adapter_digest(adapter.folder) for adapter in adapters.values()],
        weights=weights,
        settings=identity(config),
        seed=seed,
        base=model_identity(model),
    )


def _summary(report: Mapping[str, Any], config: MergingConfig) -> MergeSummary:
    cosine = torch.tensor(report["cosine"])
    count = len(cosine)
    off_diagonal = (cosine.sum() - cosine.diagonal().sum()) / max(count * (count - 1), 1)
    return MergeSummary(
        name=config.name,
        method=config.method,
        scale=config.scale,
        weights=dict(report["weights"]),
        modules=len(report["modules"]),
        rank=report["rank"],
        energy_kept=report["energy_kept"],
        mean_cosine=float(off_diagonal),
        sign_conflicts=report["sign_conflicts"],
    )
