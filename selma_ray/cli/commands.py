"""The command line.

selma plan|run|generate|train|merge|evaluate|report|study|serve RECIPE [key.path=value …]
selma data status|sheet RUN          what a run's folder holds
selma export RUN --to LAYOUT         its images, as other trainers read them
selma push RUN --to hub:OWNER/NAME   what it made, with a card, to the hub or a folder
selma merge-adapters A B --base NAME --out DIR     LoRAs from anywhere, without a run
selma recipes [NAME]                 the recipes that come with selma_ray
selma init NAME                      a recipe and a skill file of one's own to begin with
selma skills [list|check FILE]       the packaged skills; what a skill file asks for
selma explain KEY                    what a recipe's key means
selma doctor                         what this machine has, and what would not work
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selma_ray import __version__
from selma_ray.cli.completion import complete
from selma_ray.cli.merge_adapters import add_merge_adapters, execute_merge_adapters
from selma_ray.cluster.errors import known_error
from selma_ray.errors import first_line

__all__ = ["build_parser", "main"]

_COMMANDS = {
    "plan": "print what a recipe takes: weights, memory, GPU-hours and storage; nothing runs",
    "fetch": "download the models and the suite that a recipe names, into HF_HOME",
    "run": "the whole loop, from prompts to one image fetched from the served, merged model",
    "generate": "write prompts and render images",
    "train": "fit one LoRA expert per skill",
    "merge": "merge the experts",
    "evaluate": "score base, experts and merged model",
    "report": "write report.html and report.json again",
    "study": "make the experiments of a study's file over several seeds and write their tables",
    "serve": "serve the merged model over HTTP until interrupted",
}

_DATA_COMMANDS = ("data", "export", "push")
_OTHER_COMMANDS = (*_DATA_COMMANDS, "merge-adapters", "recipes", "init", "skills", "explain", "doctor")
_OF_FINISHED_RUNS = ("report", "serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 when interrupted."""
    options = _parsed(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package to whoever imports diffusers
    try:
        if options.command == "doctor":
            return _examined(options)
        _execute(options)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where this one stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        known = known_error(error)
        if known is None:
            print(
                f"selma: unexpected {type(error).__name__}: {first_line(error)}; --debug shows where", file=sys.stderr
            )
            return 1
        print(f"selma: {first_line(known)}", file=sys.stderr)
        return known.exit_code
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    complete(parser)
    # argparse ends the list of overrides at the first option; those after it belong to the list too.
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command in _OTHER_COMMANDS:
        return options
    options.overrides += rest
    return options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="selma",
        description="Make a text-to-image model follow its prompts better, and serve it.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. NO_COLOR=1 writes without colours.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in _COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("recipe", help="recipe file, or a name of `selma recipes`, such as demo")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        if name == "plan":
            command.add_argument(
                "--tflops", type=_positive, default=28.0, help="sustained TFLOP/s of a GPU (default: 28, an L40)"
            )
            command.add_argument(
                "--gpu-memory", type=_positive, metavar="GB", help="tell whether everything fits GPUs of this size"
            )
            command.add_argument("--cluster", action="store_true", help="list the groups of nodes that it can use, too")
        if name == "evaluate":
            _add_rating_options(command)
    _add_data_commands(commands)
    add_merge_adapters(commands)
    _add_first_steps(commands)
    explain = commands.add_parser("explain", help="tell what a recipe's key means: type, bounds, default, unit")
    explain.add_argument("key", nargs="?", default="", help="such as experts.lora.rank; default: the sections")
    doctor = commands.add_parser("doctor", help="tell what this machine has for a run, and what would not work")
    doctor.add_argument("run_dir", nargs="?", help="a run's folder to be, which is written and read: runs/demo, s3://…")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    for command in (explain, doctor):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_first_steps(commands: Any) -> None:
    """Add the commands that read no run: what comes with the package, and files to begin with."""
    recipes = commands.add_parser("recipes", help="list the recipes that come with selma_ray, or show one")
    recipes.add_argument("name", nargs="?", help="the recipe to show")
    recipes.add_argument("--resolved", action="store_true", help="with every default written out")
    init = commands.add_parser(
        "init", help="write a recipe and a skill file of your own to begin with, each line explained"
    )
    init.add_argument("name", nargs="?", default="my_skill", help="of the skill and its run (default: my_skill)")
    init.add_argument("--folder", default=".", help="where to write them (default: here)")
    init.add_argument(
        "--extends", default="demo", metavar="RECIPE", help="the published recipe it changes (default: demo)"
    )
    skills = commands.add_parser("skills", help="list the packaged skills, or check a skill file")
    what = skills.add_subparsers(dest="what", required=True, metavar="WHAT")
    listed = what.add_parser("list", help="the packaged skills and what each teaches")
    check = what.add_parser("check", help="seeds, caps, grammar, and the request that a language model gets")
    check.add_argument("skill", help="a skill file, or a packaged skill's name")
    for command in (recipes, listed):
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (recipes, init, listed, check):
        command.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_data_commands(commands: Any) -> None:
    """Add the commands that read a run's folder; each takes the folder alone, and works while the run does."""
    export = commands.add_parser("export", help="write a run's images in a layout that other trainers read")
    export.add_argument("--to", required=True, metavar="LAYOUT", help="imagefolder or webdataset")
    export.add_argument("--out", help="an empty folder, or s3://… (default: exports/LAYOUT in the run's folder)")
    data = commands.add_parser("data", help="show what a run's folder holds").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    status = data.add_parser("status", help="counts, rates, reasons and time left of prompts and images, at any time")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument(
        "--watch", type=_positive, nargs="?", const=2.0, metavar="SECONDS",
        help="show it again every so many seconds (2) until prompts and images are finished",
    )  # fmt: skip
    sheet = data.add_parser("sheet", help="a contact sheet of random images of every skill")
    sheet.add_argument("--out", help="a file named .html or .png (default: contact_sheet.html in the run's folder)")
    sheet.add_argument("--per-skill", type=int, default=12, help="images of a skill (default: 12)")
    sheet.add_argument("--seed", type=int, default=0, help="which random images (default: 0)")
    push = commands.add_parser(
        "push", help="push a run's merged adapter, pipeline or images, with a card, to the hub or a folder"
    )
    push.add_argument("--to", required=True, metavar="PLACE", help="hub:OWNER/NAME, by HF_TOKEN, or an empty folder")
    push.add_argument("--what", choices=("adapter", "pipeline", "dataset"), default="adapter", help="default: adapter")
    push.add_argument("--license", help="the hub's name of the licence, such as openrail++ (default: unknown)")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    for command in (export, status, sheet, push):
        command.add_argument("run", help="the run's folder, such as runs/demo or s3://…")
        command.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_rating_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--export-pairs", action="store_true", help="then write a blinded side-by-side page for raters"
    )
    command.add_argument("--pairs", type=int, default=50, metavar="COUNT", help="pairs on that page (default 50)")
    command.add_argument(
        "--ratings", action="append", metavar="FILE", help="then count a rater's choices; may be repeated"
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _examined(options: argparse.Namespace) -> int:
    """Return 0 where a machine has no fault, else 1."""
    from selma_ray.cli.doctor import examine, show_findings

    return 0 if show_findings(examine(options.run_dir), as_json=options.json) else 1


def _show_recipes(options: argparse.Namespace) -> None:
    from selma_ray.cli.recipes import list_recipes, show_recipe

    if options.name is None:
        list_recipes(as_json=options.json)
    else:
        show_recipe(options.name, resolved=options.resolved, as_json=options.json)


def _show_skills(options: argparse.Namespace) -> None:
    from selma_ray.cli.skills import check_skill, list_skills

    if options.what == "list":
        list_skills(as_json=options.json)
    else:
        check_skill(options.skill)


def _initialise(options: argparse.Namespace) -> None:
    from selma_ray.cli.init import init

    init(options.folder, options.name, options.extends)


def _explain(options: argparse.Namespace) -> None:
    from selma_ray.cli.explain import explain

    explain(options.key)


_WITHOUT_A_RUN: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "merge-adapters": execute_merge_adapters,
    "recipes": _show_recipes,
    "init": _initialise,
    "skills": _show_skills,
    "explain": _explain,
}


def _execute(options: argparse.Namespace) -> None:
    if options.command in _DATA_COMMANDS:
        from selma_ray.cli import data

        data.execute(options)
        return
    if options.command in _WITHOUT_A_RUN:
        _WITHOUT_A_RUN[options.command](options)
        return
    if options.command in ("plan", "study") and _executed_of_study(options):
        return
    from selma_ray.run.opening import open_run
    from selma_ray.run.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.command == "plan":
        from selma_ray.cli.show_plan import show_plan

        show_plan(recipe, options.tflops, options.gpu_memory, cluster=options.cluster)
        return
    from selma_ray.cli import show as console

    if options.command == "fetch":
        console.fetch(recipe)
        return
    run = open_run(recipe, make=options.command not in _OF_FINISHED_RUNS)

    if options.command == "run":
        console.run_all(run)
    elif options.command == "report":
        console.write_report(run)
    elif options.command == "serve":
        console.serve(run)
    else:
        console.run_one(run, options.command)
    if options.command == "evaluate":
        if options.export_pairs:
            console.export_pairs(run, options.pairs)
        if options.ratings:
            console.show_ratings(run, options.ratings)
        console.show_evaluation(run)


def _executed_of_study(options: argparse.Namespace) -> bool:
    """Plan or make a study; tells whether the file is one, which a recipe may be planned without."""
    from selma_ray.study.study import is_study, load_study

    if options.command == "plan" and not is_study(options.recipe):
        return False
    study = load_study(options.recipe, options.overrides)
    if options.command == "plan":
        from selma_ray.cli.show_plan import show_study_plan

        show_study_plan(study, options.tflops, options.gpu_memory)
    else:
        from selma_ray.cli.show import run_study

        run_study(study)
    return True
