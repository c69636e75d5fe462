"""What the command line does with the data of a run's folder: status, contact sheet, exports."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from selma_ray.cli.show import console
from selma_ray.errors import ConfigError
from selma_ray.run.generate import prompts_from
from selma_ray.run.lease import seconds_since_sign
from selma_ray.run.opening import Run, open_run
from selma_ray.run.push import push_run
from selma_ray.storage import RunFolder

__all__ = ["execute", "status_of"]

_SILENT_AFTER_S = 60.0


def execute(options: argparse.Namespace) -> None:
    """Run one of the commands on the folder that `options.run` names."""
    run = open_run(options.run)
    if options.command == "export":
        _export(run, options.to, options.out)
    elif options.command == "push":
        place = push_run(run, options.what, options.to, license_=options.license, private=options.private)
        console.print(f"The {options.what} is at [bold]{escape(place)}[/bold]")
    elif options.what == "status":
        _show_status(run, as_json=options.json, every_s=options.watch)
    else:
        _write_sheet(run, options.out, options.per_skill, options.seed)


def _show_status(run: Run, *, as_json: bool, every_s: float | None) -> None:
    """Show the status, once or every so many seconds until prompts and images are finished."""
    while True:
        status = status_of(run)
        if every_s is not None and not as_json:
            console.clear()  # of a terminal; in a file each status follows the one before
        console.print(json.dumps(status), markup=False) if as_json else _show(status)
        if every_s is None or status["state"] == "finished":
            return
        time.sleep(every_s)


def status_of(run: Run) -> dict[str, Any]:
    """Return what the folder tells of prompts and images: counts and reasons from its files, rates from the latest start."""
    from selma_ray.images.progress import read_progress
    from selma_ray.images.shards import count_candidates, image_summary
    from selma_ray.prompts.progress import read_prompt_progress
    from selma_ray.prompts.store import prompt_summary

    progress, written = read_progress(run.folder), read_prompt_progress(run.folder)
    status: dict[str, Any] = {
        "run": run.folder.uri,
        "state": "finished" if run.folder.done("generate") is not None else "not started",
        "prompts_wanted": run.recipe.prompts.per_skill * len(run.skills),
        "prompts": prompt_summary(run.folder, run.skill_names),
        "images": image_summary(run.folder, run.skill_names),
        "images_unjudged": count_candidates(run.folder),
    }
    if progress is not None:
        # While its models load, a run says nothing of images; its driver says that it is there.
        signs_s = [time.time() - progress.updated_at, seconds_since_sign(run.folder)]
        silent_s = min(each_s for each_s in signs_s if each_s is not None)
        if status["state"] != "finished":
            status["state"] = "stopped" if progress.ended or silent_s > _SILENT_AFTER_S else "running"
        status["latest_start"] = {
            **asdict(progress),
            "prompts_per_s": written.prompts_per_s if written and written.updated_at > progress.started_at else None,
            "images_per_s": progress.images_per_s,
            "seconds_left": progress.seconds_left if status["state"] == "running" else None,
            "silent_s": round(silent_s, 1),
        }
    return status


def _show(status: dict[str, Any]) -> None:
    prompts, images, start = status["prompts"], status["images"], status.get("latest_start")
    console.print(f"[bold]{escape(status['run'])}[/bold]: {status['state']}")
    if start:
        rates = [f"{start[f'{what}_per_s']:.3g} {what}/s" for what in ("prompts", "images") if start[f"{what}_per_s"]]
        rate = ", ".join(rates) or "no rate yet"
        left = f", {start['seconds_left'] / 60:.1f} min left" if start["seconds_left"] is not None else ""
        console.print(
            f"{start['found'] + start['rendered']} of {start['total']} images, {rate}{left}; start {start['starts']}, "
            f"{start['again']} rendered again, last word {start['silent_s']:.0f} s ago"
        )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("skill")
    for heading in ("prompts kept", "prompts rejected", "images", "images rejected", "images failed"):
        table.add_column(heading, justify="right")
    for skill, written in prompts["skills"].items():
        rendered = images["skills"][skill]
        counts = written["kept"], written["rejected"], rendered["rendered"], rendered["rejected"], rendered["failed"]
        table.add_row(skill, *map(str, counts))
    totals = prompts["kept"], prompts["rejected"], images["rendered"], images["rejected"], images["failed"]
    table.add_row("all", *map(str, totals), style="bold")
    console.print(table, soft_wrap=False)
    if status["images_unjudged"]:
        console.print(f"{status['images_unjudged']} images wait for the judge")
    for what, reasons in (("Prompts rejected", prompts["reasons"]), ("Images failed", images["reasons"])):
        if reasons:
            listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            console.print(f"{what}: {listed}", markup=False)


def _write_sheet(run: Run, out: str | None, per_skill: int, seed: int) -> None:
    from selma_ray.images.sheet import contact_sheet

    if per_skill < 1:
        raise ConfigError(f"--per-skill must be at least 1, got {per_skill}")
    name = PurePosixPath(out or "contact_sheet.html")
    sheet = contact_sheet(run.folder, run.skill_names, per_skill, seed, name.suffix)
    place = RunFolder(str(Path(out).absolute().parent)) if out else run.folder
    place.write_bytes(sheet, name.name)
    console.print(f"Contact sheet: [bold]{escape(place.path(name.name))}[/bold]")


def _export(run: Run, layout: str, out: str | None) -> None:
    from selma_ray.images.card import card_text
    from selma_ray.images.export import export_images

    recipe = run.recipe
    target = RunFolder(out or run.folder.path("exports", layout))
    model = recipe.data.model or recipe.model
    card = card_text(run.folder, run.skill_names, recipe.images, model, prompts_from(recipe))
    count = export_images(run.folder, run.skill_names, layout, target, card)
    console.print(f"{count} images exported to [bold]{escape(target.uri)}[/bold]")
