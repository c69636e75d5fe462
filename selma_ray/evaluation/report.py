"""The report of a run: report.html, which needs nothing else to be read, report.json for machines, comparison.png."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selma_ray.evaluation.examples import Example, choose_examples, paired_examples, read_images, training_images
from selma_ray.evaluation.grid import contact_sheet, data_uri, png_bytes, side_by_side
from selma_ray.evaluation.plots import axis_around, curve, intervals
from selma_ray.evaluation.summary import BASE, MERGED
from selma_ray.storage import RunFolder

__all__ = ["write_report"]

_FIRST_PER_SKILL = 3
_EXTREMES = 6
_COMPARED_PER_SKILL = 2
_SHEET_IMAGES, _SHEET_COLUMNS = 12, 6
_PLOT_WIDTH, _INTERVAL_WIDTH = 420.0, 160.0
_CURVE_WIDTH, _CURVE_HEIGHT = 240.0, 90.0
_TEMPLATE = "report.html.j2"


def write_report(folder: RunFolder, skills: Sequence[str]) -> str:
    """Write report.html, report.json and comparison.png from what a run's folder holds; returns the path of report.html."""
    evaluation = folder.done("evaluate") or {}
    recipe_text = folder.read_bytes("recipe.yaml").decode()
    chosen = choose_examples(
        paired_examples(folder, evaluation["files"], evaluation["scorer"]), _FIRST_PER_SKILL, _EXTREMES
    )
    wanted = {example.key for examples in chosen.values() for example in examples}
    images = {model: read_images(folder, evaluation["files"][model]["images"], wanted) for model in (BASE, MERGED)}
    facts = _facts(folder, skills, evaluation, yaml.safe_load(recipe_text))
    context = facts | {
        "recipe_text": recipe_text,
        "chosen": {name: [_shown(example, images) for example in examples] for name, examples in chosen.items()},
        "sheets": {skill: _sheet(folder, skill) for skill in skills},
        "plots": _plots(evaluation, facts["curves"]),
        "BASE": BASE,
        "MERGED": MERGED,
    }
    folder.write_bytes(_environment().get_template(_TEMPLATE).render(context).encode(), "report.html")
    folder.write_json(
        facts | {"examples": {name: list(map(asdict, each)) for name, each in chosen.items()}}, "report.json"
    )
    compared = _compared(chosen["first"])
    if compared:
        sheet = side_by_side({model: [images[model][example.key] for example in compared] for model in (BASE, MERGED)})
        folder.write_bytes(png_bytes(sheet), "comparison.png")
    return folder.path("report.html")


def _facts(
    folder: RunFolder, skills: Sequence[str], evaluation: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything the report states, without pictures."""
    merge_report = ("merged", recipe["merging"]["name"], "report.json")
    merged = folder.read_json(*merge_report) if folder.exists(*merge_report) else None
    if merged:
        merged = {key: value for key, value in merged.items() if key not in ("modules", "key")}
    curves = {
        skill: folder.read_json("experts", skill, "curve.json")
        for skill in skills
        if folder.exists("experts", skill, "curve.json")
    }
    return {
        "run": folder.uri,
        "recipe": recipe,
        "skills": list(skills),
        "evaluation": {key: value for key, value in evaluation.items() if key != "files"},
        "generation": folder.done("generate"),
        "merging": merged,
        "curves": curves,
    }


def _plots(evaluation: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    models = {
        name: {"mean": scores["dsg"], "interval": scores["interval"]} if scores["interval"] else None
        for name, scores in evaluation["models"].items()
    }
    bounds = [bound for row in models.values() if row for bound in row["interval"]]
    score_axis = axis_around(bounds, _INTERVAL_WIDTH)
    plots: dict[str, Any] = {
        "score_axis": score_axis,
        "scores": {each.name: each for each in intervals(models, score_axis)},
        "width": _PLOT_WIDTH,
        "curve_size": (_CURVE_WIDTH, _CURVE_HEIGHT),
    }
    if evaluation["difference"]:
        for kind in ("categories", "skills"):
            rows = evaluation["difference"][kind]
            axis = axis_around(
                [bound for row in rows.values() if row for bound in row["interval"]], _PLOT_WIDTH, include=[0.0]
            )
            plots[kind] = {"axis": axis, "rows": sorted(intervals(rows, axis), key=lambda row: -row.mean)}
    top = max((point["loss"] for points in curves.values() for point in points), default=1.0)
    drawn = (curve(skill, points, _CURVE_WIDTH, _CURVE_HEIGHT, top) for skill, points in curves.items())
    plots["curves"] = [each for each in drawn if each]
    plots["curve_top"] = top
    return plots


def _shown(example: Example, images: Mapping[str, Mapping[tuple[str, int], Any]]) -> dict[str, Any]:
    uris = {model: data_uri(images[model][example.key]) for model in (BASE, MERGED)}
    small = max(images[BASE][example.key].size) <= 128
    return {"example": example, "uris": uris, "small": small}


def _sheet(folder: RunFolder, skill: str) -> str | None:
    images = training_images(folder, skill, _SHEET_IMAGES)
    sheet = contact_sheet(images, _SHEET_COLUMNS) if images else None
    return data_uri(sheet, max_side_px=max(sheet.size)) if sheet else None


def _compared(first: Sequence[Example]) -> list[Example]:
    taken: dict[str, int] = {}
    compared = []
    for example in first:
        taken[example.skill] = taken.get(example.skill, 0) + 1
        if taken[example.skill] <= _COMPARED_PER_SKILL:
            compared.append(example)
    return compared


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}".replace("-", "−")
    environment.filters["p_value"] = lambda value: "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
    return environment
