"""`selma recipes`: the recipes and studies that come with selma_ray."""

import difflib
import json

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from selma_ray.cli.show import console
from selma_ray.config import read_yaml
from selma_ray.errors import ConfigError
from selma_ray.run.published import about, published_recipes
from selma_ray.run.recipe import load_recipe

__all__ = ["list_recipes", "show_recipe"]


def list_recipes(*, as_json: bool) -> None:
    """Print each recipe's name and what it is for."""
    rows = [
        {
            "name": name,
            "kind": "study" if "arms" in read_yaml(path) else "recipe",
            "about": about(path),
            "path": str(path),
        }
        for name, path in published_recipes().items()
    ]
    if as_json:
        console.print(json.dumps(rows), markup=False, soft_wrap=True)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("name", "kind", "about"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(escape, (row["name"], row["kind"], row["about"])))
    console.print(table)
    console.print(
        "`selma recipes NAME` shows one, `selma plan NAME` what it takes, `selma run NAME` runs it.", markup=False
    )


def show_recipe(name: str, *, resolved: bool, as_json: bool) -> None:
    """Print a recipe's file, or with every default written out; raises ConfigError for a name that there is not."""
    paths = published_recipes()
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1)
        meant = f"did you mean {near[0]}; " if near else ""
        raise ConfigError(f"{name} is no published recipe; {meant}`selma recipes` lists them")
    if as_json:
        console.print(json.dumps(load_recipe(paths[name]).model_dump(mode="json")), markup=False, soft_wrap=True)
        return
    text = load_recipe(paths[name]).as_yaml() if resolved else paths[name].read_text(encoding="utf-8")
    console.print(Syntax(text, "yaml", background_color="default") if console.is_terminal else text, markup=False)
