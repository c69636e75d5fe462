"""selma merge-adapters: LoRAs from anywhere become one, without a run and without a recipe."""

import argparse
from pathlib import Path
from typing import Any

from selma_ray.errors import ConfigError

__all__ = ["add_merge_adapters", "execute_merge_adapters"]

_SETTINGS = ("method", "scale", "rank", "density", "adapter_dtype", "export_dtype", "skip_text_encoders")


def add_merge_adapters(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "merge-adapters", help="merge LoRA files, adapter folders or runs of one base model into one adapter"
    )
    command.add_argument("adapters", nargs="+", metavar="[NAME=]PATH[@WEIGHT]", help="an adapter, its name and weight")
    command.add_argument(
        "--base", required=True, metavar="MODEL", help="the model they are for: a folder or a hub name"
    )
    command.add_argument("--base-revision", metavar="REVISION", help="its revision at the hub")
    command.add_argument("--out", required=True, metavar="DIR", help="where adapter, exports and report.json go")
    command.add_argument("--method", help="as merging.method (default: average_deltas)")
    command.add_argument("--scale", type=float, help="as merging.scale")
    command.add_argument("--rank", type=int, help="as merging.rank")
    command.add_argument("--density", type=float, help="as merging.density")
    command.add_argument("--adapter-dtype", help="as merging.adapter_dtype")
    command.add_argument("--export-dtype", help="as merging.export_dtype")
    command.add_argument(
        "--skip-text-encoders", action="store_true", default=None, help="as merging.skip_text_encoders"
    )
    command.add_argument("--seed", type=int, default=0, help="of dare (default: 0)")
    command.add_argument("--pipeline", action="store_true", help="write the baked pipeline too")
    command.add_argument("--debug", action="store_true", help="show tracebacks")


def execute_merge_adapters(options: argparse.Namespace) -> None:
    """Merge and say what came out; raises ConfigError for bad settings, AdapterError for bad adapters."""
    from selma_ray.config import validate
    from selma_ray.merging.config import MergingConfig
    from selma_ray.merging.run import merge_adapters
    from selma_ray.models.config import ModelConfig

    places, weights = _named(options.adapters)
    settings = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    if weights:
        settings["weights"] = {name: weights.get(name, 1.0) for name in places}
    config = validate(MergingConfig, settings, "merge-adapters")
    if config.method == "search":
        raise ConfigError("--method must not be search, which scores candidates on a run's dev prompts; name another")
    if config.method == "distil":
        raise ConfigError("--method must not be distil, whose student draws a run's prompts; name another")
    if config.method == "regmean":
        raise ConfigError("--method must not be regmean, which needs the examples of a run's experts; name another")
    model = validate(ModelConfig, {"name": options.base, "revision": options.base_revision}, "merge-adapters")
    summary = merge_adapters(places, model, config, Path(options.out), options.seed, bake=options.pipeline)
    print(
        f"{len(places)} adapters became {options.out}: {summary.modules} modules, rank {summary.rank} keeps "
        f"{100 * summary.energy_kept:.1f}% of their merge, mean cosine {summary.mean_cosine:.2f}"
    )


def _named(arguments: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Return paths and weights by name; a name that is not given is the file's or folder's."""
    places: dict[str, str] = {}
    weights: dict[str, float] = {}
    for argument in arguments:
        given, separator, rest = argument.partition("=")
        path, name = (rest, given) if separator else (argument, "")
        before, at, after = path.rpartition("@")
        weight = _number(after) if at else None
        path = before if weight is not None else path
        name = name or _free_name(Path(path).stem, places)
        if name in places:
            raise ConfigError(f"adapters must have different names, {name} is given twice; name them NAME=PATH")
        places[name] = path
        if weight is not None:
            weights[name] = weight
    return places, weights


def _free_name(stem: str, taken: dict[str, str]) -> str:
    plain = "".join(letter if letter.isalnum() else "-" for letter in stem).strip("-") or "adapter"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
