"""The last line of the benchmark: ratios by family, and where they were measured."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_parts.pipelines import FAMILIES

__all__ = ["RATIOS", "summary"]

RATIOS = {
    "render_over_diffusers": ("rendering", "speed"),
    "train_over_diffusers": ("training", "speed"),
    "serve_over_diffusers": ("serving", "speed"),
}
"""Ratios by the part and the case that they are measured in."""


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return each ratio by family; None where it was not measured. Memory over plan is that of the recipe's own mode."""
    parts = found["parts"]
    ratios: dict[str, Any] = {
        key: {family: parts.get(part, {}).get(f"{family} {case}", {}).get(key) for family in FAMILIES}
        for key, (part, case) in RATIOS.items()
    }
    ratios["peak_over_plan"] = {family: _of_own_mode(parts.get("training", {}), family) for family in FAMILIES}
    return ratios | {"machine": found["machine"], "tiny": found["tiny"]}


def _of_own_mode(cases: Mapping[str, Any], family: str) -> float | None:
    """Return the first ratio of a family: modes begin with the recipe's own."""
    ratios = [
        case["peak_over_plan"]
        for name, case in cases.items()
        if name.startswith(f"{family} ") and "peak_over_plan" in case
    ]
    return ratios[0] if ratios else None
