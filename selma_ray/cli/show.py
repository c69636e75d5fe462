"""What the command line shows: progress of each stage, the result table, the served image."""

import json
import shlex
import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selma_ray.cli.bars import progress_display
from selma_ray.cluster.connection import connect
from selma_ray.errors import ConfigError, SelmaError
from selma_ray.run.demands import SERVE
from selma_ray.run.lease import held
from selma_ray.run.models import check_trainable
from selma_ray.run.opening import Run
from selma_ray.run.recipe import Recipe
from selma_ray.run.stages import STAGES, check_before, finished, run_stage
from selma_ray.study.study import Study

__all__ = [
    "export_pairs",
    "fetch",
    "run_all",
    "run_one",
    "run_study",
    "serve",
    "show_evaluation",
    "show_ratings",
    "write_report",
]

_SHUTDOWN_S = 3.0
"""Seconds for a service on a cluster to end; a local one ends with this process, whatever it still does."""

_TITLES = {
    "generate": "Prompts and images: vLLM streams into the renderers",
    "train": "Experts: one LoRA per skill, DeepSpeed under Ray Train",
    "merge": "Merging the experts",
    "evaluate": "Evaluation: base, experts and merged on the same prompts and seeds",
}

console = Console(highlight=False, soft_wrap=True)


def run_all(run: Run) -> None:
    """Run every stage, show the table, and fetch one image from the served merged model."""
    check_trainable(run.recipe)
    started_s = time.monotonic()
    with held(run.folder):
        console.print("[dim]Starting Ray, or joining it[/dim]")
        connect(run.recipe.cluster)
        check_before(run, [*STAGES, SERVE])
        for name in STAGES:
            run_one(run, name)
        show_evaluation(run)
    try:
        _fetch_one_image(run)
    except SelmaError as error:  # the run is finished all the same
        console.print(f"[yellow]No picture of the served model: {escape(str(error))}[/yellow]")
    console.print(f"\nFinished in {_minutes(time.monotonic() - started_s)}.")
    for line in _next_steps(run):
        console.print(line, markup=False, soft_wrap=True)


def _next_steps(run: Run) -> list[str]:
    """Return what to look at and what to try next."""
    recipe = run.folder.path("recipe.yaml")
    is_first_look = run.recipe.model.name == "miniature" and run.recipe.experts.nft is None
    learn_on = "Let experts learn from images of their own, for half as much gain again: selma run miniature_nft"
    return [
        f"Look at {run.folder.path('report.html')} and at what it learnt from: selma data sheet {run.folder.uri}",
        f"Serve it, with a page to compare models on: selma serve {recipe}",
        *([learn_on] if is_first_look else []),
        "Teach it a skill of your own: selma init; other models and machines: selma recipes",
    ]


def fetch(recipe: Recipe) -> None:
    """Download what a recipe names and show where it is."""
    from selma_ray.run.models import fetch_models

    fetch_models(recipe, lambda what, place: console.print(f"[green]✓[/green] {escape(what)} → {escape(place)}"))


def run_one(run: Run, name: str) -> None:
    """Run one stage with a progress display; a finished stage says so."""
    if finished(run, name) is not None:
        console.print(f"[dim]✓ {_TITLES[name]}: finished before, in {escape(run.folder.uri)}[/dim]")
        return
    console.print(f"[bold]{_TITLES[name]}[/bold]")
    started_s = time.monotonic()
    with progress_display(console) as report:
        summary = run_stage(run, name, report)
    console.print(
        f"[green]✓[/green] {_summary_line(name, summary)} [dim]({_minutes(time.monotonic() - started_s)})[/dim]"
    )


def run_study(study: Study) -> None:
    """Make the experiments of a study, then show where its tables are."""
    from selma_ray.study.run import study_steps

    steps = study_steps(study)
    for number, step in enumerate(steps, start=1):
        started_s = time.monotonic()
        console.print(f"[bold]Study {number}/{len(steps)}: {escape(step.title)}[/bold]")
        with progress_display(console) as report:
            step.do(report)
        console.print(f"[green]✓[/green] {escape(step.title)} [dim]({_minutes(time.monotonic() - started_s)})[/dim]")
    console.print(f"Tables: [bold]{escape(study.results.path('tables.md'))}[/bold]")


def write_report(run: Run) -> None:
    """Write report.html and report.json from what the run folder holds."""
    from selma_ray.evaluation.report import write_report as write

    if run.folder.done("evaluate") is None:
        raise ConfigError(f"report needs the finished stage evaluate in {run.folder.uri}; run `selma evaluate` first")
    console.print(f"Report: [bold]{escape(write(run.folder, run.skill_names))}[/bold]")


def show_evaluation(run: Run) -> None:
    """Show the table of a finished evaluation and what it leaves out, and write the report."""
    summary = run.folder.done("evaluate") or {}
    console.print(_score_table(summary), soft_wrap=False)
    for name, scores in summary["models"].items():
        for reason, count in scores["unscored"]["reasons"].items():
            console.print(
                f"[yellow]{name}: {count} of {scores['images']} images have no score: {escape(reason)}[/yellow]"
            )
    write_report(run)


def export_pairs(run: Run, count: int) -> None:
    """Write the page on which raters choose between base and merged."""
    from selma_ray.evaluation.pairs import export_pairs as export

    if count < 1:
        raise ConfigError(f"--pairs must be at least 1, got {count}")
    page = export(run.folder, run.folder.done("evaluate") or {}, count, run.recipe.seed)
    console.print(f"Pairs for raters: [bold]{escape(page)}[/bold]; keep key.json beside it to yourself")


def show_ratings(run: Run, files: Sequence[str]) -> None:
    """Print how often raters preferred merged."""
    from selma_ray.evaluation.pairs import read_ratings

    result = read_ratings(run.folder, files)
    line = f"merged preferred in {result['wins']} of {result['pairs']} pairs, base in {result['losses']}, neither in {result['ties']}"
    if result["share"]:
        low, high = (100 * bound for bound in result["share"]["interval"])
        line += f": {100 * result['share']['mean']:.1f}% of the decided ones, 95% interval {low:.1f} to {high:.1f}"
    console.print(line)


def serve(run: Run) -> None:
    """Serve the merged model until interrupted or terminated, then finish what was accepted."""
    console.print("[dim]Starting Ray, or joining it; then the models and the judge load, and one image is drawn[/dim]")
    service = _start_service(run)
    try:
        console.print(f"Serving {run.recipe.merging.name} at [bold]{service.url}[/bold] (interrupt to stop)")
        body = json.dumps({"prompt": _example_prompt(run)})
        key = ' -H "Authorization: Bearer $SELMA_API_KEY"' if run.recipe.serving.api_keys_file else ""
        console.print(
            f"  curl {service.url}/v1/images/generations -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
            markup=False,
        )
        service.wait()
        console.print(f"Stopping; accepted requests have {run.recipe.serving.drain_s:g} s (interrupt to stop at once)")
        service.drain()
    finally:
        service.leave(_SHUTDOWN_S)


def _start_service(run: Run) -> Any:
    from selma_ray.run.serve import start_merged

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
            f"[green]✓[/green] POST {service.url}/v1/images/generations “{escape(prompt)}” → {escape(run.folder.path('served.png'))}"
        )
    finally:
        service.leave(_SHUTDOWN_S)


def _example_prompt(run: Run) -> str:
    return run.skills[0].seeds[0]


def _summary_line(name: str, summary: dict[str, Any]) -> str:
    if name == "generate":
        prompts, images = summary["prompts"], summary["images"]
        line = f"{prompts['kept']} prompts kept, {prompts['rejected']} rejected; {images['rendered']} images, {images['failed']} failed"
        return line + _whole_words(summary.get("questions")) + _cut_words(summary.get("long_prompts"))
    if name == "train":
        return f"{len(summary)} experts fitted: " + ", ".join(
            f"{skill} loss {expert['loss']:.3f}" for skill, expert in summary.items()
        )
    if name == "merge":
        return f"{summary['method']} of {len(summary['experts'])} experts over {summary['modules']} modules"
    return f"{len(summary['models'])} models scored on {summary['prompts']} prompts"


def _whole_words(questions: dict[str, Any] | None) -> str:
    """Return in words how many prompts have no questions of their own, where there are such."""
    if not questions or questions["source"] == "whole" or not questions["whole"]:
        return ""
    return f"; {questions['whole']} of {questions['prompts']} prompts are judged by one question about the whole prompt"


def _cut_words(lengths: dict[str, Any] | None) -> str:
    """Return in words how many prompts the model does not see the end of, where there are such."""
    if not lengths or not lengths["cut"]:
        return ""
    return (
        f"; {lengths['cut']} of {lengths['prompts']} prompts are cut at the {lengths['limit']} tokens that the model sees, the longest "
        f"has {lengths['longest']}"
    )


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
    second = summary.get("second_judge")
    for heading in ("all", "interval", *(["second judge"] if second else []), *skills):
        table.add_column(heading, justify="right")
    for name, scores in summary["models"].items():
        low, high = map(_percent, scores["interval"])
        overall, *by_skill = map(_percent, [scores["dsg"], *(scores["skills"][skill] for skill in skills)])
        interval = f"{low}-{high}"
        by_second = [_percent((second["models"].get(name) or {}).get("dsg"))] if second else []
        table.add_row(
            name, overall, interval, *by_second, *by_skill, style="bold" if name in ("base", "merged") else None
        )
    return table


def _percent(figure: float | None) -> str:
    return "–" if figure is None else f"{100 * figure:.1f}"


def _difference_line(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "base and merged have no scored image in common"
    low, high = difference["interval"]
    return f"merged - base: {100 * difference['mean']:+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}] (paired)"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
