"""What the command line shows: progress of each stage, the result table, the served image."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from selma_ray.errors import ConfigError
from selma_ray.loop import STAGES, Progress, Report, Run, run_stage

__all__ = ["run_all", "run_one", "serve", "write_report"]

_LINE_EVERY_S = 10.0
_DETAIL_CHARS = 60

_TITLES = {
    "generate": "Prompts and images: vLLM streams into the renderers",
    "train": "Experts: one LoRA per skill, DeepSpeed under Ray Train",
    "merge": "Merging the experts",
    "evaluate": "Evaluation: base, experts and merged on the same prompts and seeds",
}

console = Console(highlight=False, soft_wrap=True)


def run_all(run: Run) -> None:
    """Run every stage, show the table, and fetch one image from the served merged model."""
    started_s = time.monotonic()
    for name in STAGES:
        run_one(run, name)
    console.print(_score_table(run.folder.done("evaluate") or {}), soft_wrap=False)
    write_report(run)
    _fetch_one_image(run)
    console.print(
        f"\nFinished in {_minutes(time.monotonic() - started_s)}. Serve it: selma serve {run.folder.path('recipe.yaml')}"
    )


def run_one(run: Run, name: str) -> None:
    """Run one stage with a progress display; a finished stage says so."""
    if run.folder.done(name) is not None:
        console.print(f"[dim]✓ {_TITLES[name]}: finished before, in {run.folder.uri}[/dim]")
        return
    console.print(f"[bold]{_TITLES[name]}[/bold]")
    started_s = time.monotonic()
    with _progress_display() as report:
        summary = run_stage(run, name, report)
    console.print(
        f"[green]✓[/green] {_summary_line(name, summary)} [dim]({_minutes(time.monotonic() - started_s)})[/dim]"
    )


def write_report(run: Run) -> None:
    """Write report.html and report.json from what the run folder holds."""
    from selma_ray.evaluation.report import write_report as write

    if run.folder.done("evaluate") is None:
        raise ConfigError(f"report needs the finished stage evaluate in {run.folder.uri}; run `selma evaluate` first")
    console.print(f"Report: [bold]{write(run.folder, run.skill_names)}[/bold]")


def serve(run: Run) -> None:
    """Serve the merged model until interrupted."""
    service = _start_service(run)
    try:
        console.print(f"Serving {run.recipe.merging.name} at [bold]{service.url}[/bold] (interrupt to stop)")
        body = json.dumps({"prompt": _example_prompt(run)})
        console.print(f"  curl {service.url}/v1/images/generations -H 'Content-Type: application/json' -d '{body}'")
        while True:
            time.sleep(3600)
    finally:
        service.stop()


def _start_service(run: Run) -> Any:
    from selma_ray.service import start_merged

    if run.folder.done("merge") is None:
        raise ConfigError(f"serve needs the finished stage merge in {run.folder.uri}; run `selma merge` first")
    return start_merged(run)


def _fetch_one_image(run: Run) -> None:
    console.print("[bold]Serving the merged model[/bold]")
    service = _start_service(run)
    try:
        prompt = _example_prompt(run)
        image = service.generate(prompt=prompt, seed=run.recipe.seed)
        run.folder.write_bytes(image, "served.png")
        console.print(
            f"[green]✓[/green] POST {service.url}/v1/images/generations “{prompt}” → {run.folder.path('served.png')}"
        )
    finally:
        service.stop()


def _example_prompt(run: Run) -> str:
    return run.skills[0].seeds[0]


def _summary_line(name: str, summary: dict[str, Any]) -> str:
    if name == "generate":
        prompts, images = summary["prompts"], summary["images"]
        return f"{prompts['kept']} prompts kept, {prompts['rejected']} rejected; {images['rendered']} images, {images['failed']} failed"
    if name == "train":
        return f"{len(summary)} experts fitted: " + ", ".join(
            f"{skill} loss {expert['loss']:.3f}" for skill, expert in summary.items()
        )
    if name == "merge":
        return f"{summary['method']} of {len(summary['experts'])} experts over {summary['modules']} modules"
    return f"{len(summary['models'])} models scored on {summary['prompts']} prompts"


def _score_table(summary: dict[str, Any]) -> Table:
    """Return the table of DSG scores with 95% intervals, and the paired difference of merged and base."""
    skills = list(next(iter(summary["models"].values()))["skills"])
    table = Table(
        title="DSG in percent, with 95% intervals over prompts",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
    )
    table.caption, table.caption_justify = _difference_line(summary["difference"]), "left"
    table.add_column("model")
    for heading in ("all", "interval", *skills):
        table.add_column(heading, justify="right")
    for name, scores in summary["models"].items():
        low, high = scores["interval"]
        figures = [scores["dsg"], *(scores["skills"][skill] for skill in skills)]
        overall, *by_skill = [f"{100 * figure:.1f}" for figure in figures]
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        table.add_row(name, overall, interval, *by_skill, style="bold" if name in ("base", "merged") else None)
    return table


def _difference_line(difference: dict[str, Any]) -> str:
    low, high = difference["interval"]
    return f"merged - base: {100 * difference['mean']:+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}] (paired)"


@contextmanager
def _progress_display() -> Iterator[Report]:
    """Yield a report function that draws a bar on a terminal and prints a line now and then elsewhere."""
    if not console.is_terminal:
        yield _line_reporter()
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None, detail="starting")

        def report(progress: Progress) -> None:
            bars.update(task, completed=progress.done, total=progress.total, detail=progress.detail[:_DETAIL_CHARS])

        yield report


def _line_reporter() -> Report:
    last_s = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LINE_EVERY_S or progress.done == progress.total:
            last_s = time.monotonic()
            console.print(f"  {progress.stage} {progress.done}/{progress.total} {progress.detail[:_DETAIL_CHARS]}")

    return report


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
