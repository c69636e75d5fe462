"""Stage: the experts of a run become one model, `merged/<name>/` with an adapter, a baked pipeline and a report."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selma_ray.errors import AdapterError
from selma_ray.merging.adapters import WEIGHTS_FILE, Adapter, LoraFactors, open_adapter, shapes_of, write_adapter
from selma_ray.merging.bake import bake_pipeline, pipeline_folder
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.methods import METHODS
from selma_ray.merging.report import MergeReport
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.records import content_id
from selma_ray.storage import RunFolder, storage_errors

__all__ = ["MergeSummary", "merge_experts"]

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REPORT_FILE = "report.json"


@dataclass(frozen=True)
class MergeSummary:
    """What was merged and how; `energy_kept` is what truncating the merge to the experts' rank would keep of it."""

    name: str
    method: str
    scale: float
    weights: dict[str, float]
    modules: int
    rank: int
    energy_kept: float
    mean_cosine: float

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values; `experts` lists the skills in order."""
        return {**asdict(self), "experts": list(self.weights)}


def merge_experts(folder: RunFolder, skills: Sequence[str], model: ModelConfig, config: MergingConfig) -> MergeSummary:
    """Merge `experts/<skill>/` of a run into `merged/<name>/`: adapter/, pipeline/ and report.json.

    The folder appears whole or not at all; one that was made from the same experts in the same way is kept. Raises AdapterError where
    an expert is missing, unreadable, or does not fit the model.
    """
    adapters = [open_adapter(folder.local_path("experts", skill)) for skill in skills]
    _check_base(adapters, model)
    weights = _weights(skills, config)
    target = folder.local_path("merged", config.name)
    key = _content_key(adapters, weights, model, config)
    before = _report_of(target)
    if before and before["key"] == key:
        logger.info("%s holds this merge already", target)
        return _summary(before, config)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    with storage_errors(str(target)):
        _remove_leftovers(target)
        try:
            part.mkdir(parents=True)
            report = _build(part, dict(zip(skills, adapters, strict=True)), weights, model, config)
            report |= {"key": key, "method": config.method, "scale": config.scale, "weights": weights}
            (part / _REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
            if target.exists():
                shutil.rmtree(target)
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return _summary(report, config)


def _check_base(adapters: Sequence[Adapter], model: ModelConfig) -> None:
    for adapter in adapters:
        if adapter.base_model not in (None, "", model.name):
            raise AdapterError(
                f"{adapter.folder}: base_model_name_or_path must be {model.name!r} as model.name says, "
                f"got {adapter.base_model!r}; merge experts of this base, or mend model.name"
            )


def _build(
    part: Path, adapters: Mapping[str, Adapter], weights: Mapping[str, float], model: ModelConfig, config: MergingConfig
) -> dict[str, Any]:
    experts = list(adapters.values())
    shapes = shapes_of(experts)
    merged = _merger(experts, [weights[skill] for skill in adapters], config)
    report = MergeReport(list(adapters), rank=max(expert.rank for expert in experts))

    def measured(module: str) -> LoraFactors:
        result = merged(module)
        report.add([expert.factors(module) for expert in experts], result)
        return result

    rank = sum(expert.rank for expert in experts) if config.method == "average_deltas" else experts[0].rank
    write_adapter(part / "adapter", map(measured, shapes), shapes, rank, experts[0].base_model)
    bake_pipeline(pipeline_folder(model), part / "pipeline", shapes, merged, _DTYPES[model.dtype], model.variant)
    return report.as_dict()


def _merger(
    experts: Sequence[Adapter], weights: Sequence[float], config: MergingConfig
) -> Callable[[str], LoraFactors]:
    method = METHODS[config.method]
    return lambda module: method([expert.factors(module) for expert in experts], weights, config.scale)


def _weights(skills: Sequence[str], config: MergingConfig) -> dict[str, float]:
    if config.weights is None:
        return dict.fromkeys(skills, 1 / len(skills))
    missing = set(skills) - set(config.weights)
    if missing:
        raise AdapterError(
            f"merging.weights must weigh every skill, {sorted(missing)[0]!r} is missing; add it or leave weights out"
        )
    return {skill: config.weights[skill] for skill in skills}


def _content_key(
    adapters: Sequence[Adapter], weights: Mapping[str, float], model: ModelConfig, config: MergingConfig
) -> str:
    hashes = []
    for adapter in adapters:
        with (adapter.folder / WEIGHTS_FILE).open("rb") as stream:
            hashes.append([hashlib.file_digest(stream, "sha256").hexdigest(), adapter.scale])
    located = locate_text_to_image(model.name, model.revision)
    return content_id(
        experts=hashes,
        weights=weights,
        method=config.method,
        scale=config.scale,
        base=located.revision,
        dtype=model.dtype,
    )


def _report_of(target: Path) -> dict[str, Any] | None:
    path = target / _REPORT_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


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
    )
