"""The report of a run: report.html, which needs nothing else to be read, report.json for machines, comparison.png."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selma_ray import __version__
from selma_ray.evaluation.examples import Example, choose_examples, paired_examples, read_images, training_images
from selma_ray.evaluation.plots import axis_around, curve, dev_curve, intervals, reliability
from selma_ray.evaluation.summary import BASE, MERGED
from selma_ray.pictures import data_uri, picture_grid, png_bytes
from selma_ray.storage import RunFolder

__all__ = ["write_report"]

_FIRST_PER_SKILL = 3
_EXTREMES = 6
_COMPARED_PER_SKILL = 2
_COMPARED_PX = 128
_SHEET_IMAGES, _SHEET_COLUMNS, _SHEET_CELL_PX = 12, 6, 96
_PLOT_WIDTH, _INTERVAL_WIDTH = 420.0, 160.0
_CURVE_WIDTH, _CURVE_HEIGHT = 240.0, 90.0
_RELIABILITY_SIDE = 240.0
_VERSIONS_OF = ("torch", "diffusers", "transformers", "peft", "deepspeed", "ray")
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
        "plots": _plots(evaluation, facts["curves"], facts["dev_scores"]),
        "BASE": BASE,
        "MERGED": MERGED,
    }
    folder.write_bytes(_environment().get_template(_TEMPLATE).render(context).encode(), "report.html")
    folder.write_json(
        facts | {"examples": {name: list(map(asdict, each)) for name, each in chosen.items()}}, "report.json"
    )
    compared = _compared(chosen["first"])
    if compared:
        shown = [[images[model][example.key] for example in compared] for model in (BASE, MERGED)]
        folder.write_bytes(png_bytes(picture_grid(shown, _COMPARED_PX, labels=(BASE, MERGED))), "comparison.png")
    return folder.path("report.html")


def _facts(
    folder: RunFolder, skills: Sequence[str], evaluation: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything the report states, without pictures."""
    merge_report = ("merged", recipe["merging"]["name"], "report.json")
    merged = folder.read_json(*merge_report) if folder.exists(*merge_report) else None
    if merged:
        merged = {key: value for key, value in merged.items() if key not in ("modules", "key")}
    fitted = list(dict.fromkeys([*skills, *(folder.done("train") or ())]))  # with what is fitted to all skills together
    return {
        "run": folder.uri,
        "recipe": recipe,
        "skills": list(skills),
        "evaluation": {key: value for key, value in evaluation.items() if key != "files"},
        "generation": folder.done("generate"),
        "merging": merged,
        "curves": _of_experts(folder, fitted, "curve.json"),
        "dev_scores": _of_experts(folder, fitted, "dev_scores.json"),
        "image_metrics": [folder.read_json(path) for path in folder.files("evaluation", "metrics", suffix=".json")],
        "ratings": folder.read_json("pairs", "result.json") if folder.exists("pairs", "result.json") else None,
        "command": f"selma run {folder.path('recipe.yaml')} run_dir=runs/again",
        "commands": _commands(folder),
        "versions": _versions(),
    }


def _commands(folder: RunFolder) -> dict[str, str]:
    """Return the command that makes each part of the report."""
    recipe = folder.path("recipe.yaml")
    stages = {stage: f"selma {stage} {recipe}" for stage in ("generate", "train", "merge", "evaluate")}
    ratings = f"selma evaluate {recipe} --export-pairs, and then --ratings FILE"
    return {**stages, "ratings": ratings, "score_images": f"python -m jobs.score_images {folder.uri}"}


def _of_experts(folder: RunFolder, experts: Sequence[str], name: str) -> dict[str, Any]:
    return {
        expert: folder.read_json("experts", expert, name)
        for expert in experts
        if folder.exists("experts", expert, name)
    }


def _versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what it computes, as far as they are installed."""
    versions = {"selma_ray": __version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _plots(
    evaluation: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    dev_scores: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, Any]:
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
    placed = (curve(skill, points, _CURVE_WIDTH, _CURVE_HEIGHT, top) for skill, points in curves.items())
    drawn = [each for each in placed if each]
    plots["curves"] = drawn
    plots["curve_top"] = top
    plots["dev"], plots["dev_range"] = _dev_plots(dev_scores, {each.name: each.steps for each in drawn})
    if evaluation.get("judge_error"):
        plots["reliability"] = reliability(evaluation["judge_error"]["bins"], _RELIABILITY_SIDE)
        plots["reliability_side"] = _RELIABILITY_SIDE
    return plots


def _dev_plots(
    dev_scores: Mapping[str, Sequence[Mapping[str, float]]], steps: Mapping[str, int]
) -> tuple[dict[str, Any], tuple[float, float]]:
    """Return {skill: points} of the dev scores on one scale, and the scale's ends."""
    scores = [point["dsg"] for points in dev_scores.values() for point in points]
    if not scores:
        return {}, (0.0, 1.0)
    low, high = min(scores) - 0.02, max(scores) + 0.02
    placed: dict[str, Any] = {
        skill: {
            "points": dev_curve(points, _CURVE_WIDTH, _CURVE_HEIGHT, steps[skill], low, high),
            "best": max(points, key=_rank_of_dev_score),
        }
        for skill, points in dev_scores.items()
        if points and skill in steps
    }
    return placed, (low, high)


def _rank_of_dev_score(point: Mapping[str, float]) -> tuple[float, float]:
    """Rank as the choice of the checkpoint does: the highest score, of equal ones the earliest."""
    return (point["dsg"], -point["step"])


def _shown(example: Example, images: Mapping[str, Mapping[tuple[str, int], Any]]) -> dict[str, Any]:
    uris = {model: data_uri(images[model][example.key]) for model in (BASE, MERGED)}
    small = max(images[BASE][example.key].size) <= 128
    return {"example": example, "uris": uris, "small": small}


def _sheet(folder: RunFolder, skill: str) -> str | None:
    images = training_images(folder, skill, _SHEET_IMAGES)
    if not images:
        return None
    rows = [images[start : start + _SHEET_COLUMNS] for start in range(0, len(images), _SHEET_COLUMNS)]
    sheet = picture_grid(rows, _SHEET_CELL_PX, gap_px=3, margin_px=0, transparent=True)
    return data_uri(sheet, max_side_px=max(sheet.size))


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
    environment.filters["signed"] = lambda value: f"{value:+.3g}".replace("-", "−")
    environment.filters["p_value"] = lambda value: "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
    return environment
